"""Ranks forked from one process that has imported everything: N ranks for the price of one import of DiffSynth.

For checks of what ranks do together. A test of how ranks are started, or of one that dies, uses torchrun.
"""

import os
from collections.abc import Callable

import torch.multiprocessing

from ops.private_broker import free_ports


def run_ranks(world_size: int, rank_main: Callable[[], None]) -> None:
    """Runs `rank_main` in `world_size` processes with torchrun's environment. Raises when one of them failed."""
    (port,) = free_ports(1)
    torch.multiprocessing.start_processes(
        _start, args=(world_size, port, rank_main), nprocs=world_size, start_method="fork"
    )


def _start(rank: int, world_size: int, port: int, rank_main: Callable[[], None]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank_main()
