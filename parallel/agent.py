"""torchrun's elastic agent, run in this process: starts the ranks of one node and waits for them.

Leaves out restarting them and signals: both are the launcher's (`daemon.launcher`).
"""

import sys
import uuid
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run_ranks(module: str, *, nproc_per_node: int, log_directory: Path) -> dict[int, int]:
    """Runs `python -m module` on every rank until all have ended, or one has failed and the rest were ended.

    Returns the exit statuses of the ranks that failed, by rank (negative: the signal); empty when all went
    well.
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
        logs_specs=DefaultLogsSpecs(log_dir=str(log_directory)),
        signals_to_handle="SIGQUIT",  # SIGTERM and SIGINT are the launcher's: they drain
    )
    try:
        elastic_launch(launch, sys.executable)("-m", module)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


def count_gpus() -> int:
    """How many CUDA devices this node has."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
