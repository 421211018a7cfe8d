"""torchrun's elastic agent, run in this process: starts the ranks of one node and waits for them.

Leaves out restarting them and signals: both are the launcher's (`daemon.launcher`).
"""

import contextlib
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

StartMethod = Literal["forkserver", "spawn"]


class RanksNotStartedError(RuntimeError):
    """Raised when the process that ranks are forked from is gone: the next call gets a new one."""


def run_ranks(
    entry: Callable[[], None], *, nproc_per_node: int, start_method: StartMethod, log_directory: Path
) -> dict[int, int]:
    """Calls `entry` in a process for every rank until all have returned, or one has failed and the rest were ended.

    Returns the exit status of the rank whose failure was seen first, by rank (negative: the signal); empty when all
    went well. `start_method` is multiprocessing's. Raises RanksNotStartedError.
    """
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc_per_node,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,  # torchrun counts restarts over its whole life, so reeld restarts the group itself
        monitor_interval=0.1,
        start_method=start_method,
        logs_specs=DefaultLogsSpecs(log_dir=str(log_directory)),
        signals_to_handle="SIGQUIT",  # SIGTERM and SIGINT are the launcher's: they drain
    )
    try:
        with _main_not_run_again():
            elastic_launch(launch, entry)()
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except (EOFError, ConnectionError) as error:  # the fork server ended while it was asked for a rank
        raise RanksNotStartedError(f"{type(error).__name__}: {error}") from error
    return {}


@contextlib.contextmanager
def _main_not_run_again() -> Iterator[None]:
    """Meanwhile multiprocessing finds no main program, which it would otherwise run once more in every rank."""
    main = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def count_gpus() -> int:
    """How many CUDA devices this node has."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
