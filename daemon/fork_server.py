"""The process that ranks are forked from: it has imported all that they need, so that a rank starts at once.

A rank's imports take ten seconds; a group that is started again waits for none of them, ranks that start together
share one process's, and they share its memory. The standard library's fork server (multiprocessing's start method
`forkserver`), with this module as the one that it loads first. It must not touch CUDA, which does not survive a fork:
torch counts the devices by NVML instead, and a rank that finds otherwise says so (`daemon.rank`), upon which the
launcher starts its ranks by `spawn`. Leaves out the ranks' processes (`daemon.rank_processes`).
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
from pathlib import Path

from daemon.logs import RUNTIME_VARIABLE
from daemon.rank_processes import announce_fork_server, die_with_parent


def start_fork_server() -> None:
    """In the launcher's main thread. Returns at once; the imports go on meanwhile. Safe to call twice."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch.cuda.is_available() without CUDA
    multiprocessing.set_forkserver_preload(["daemon.fork_server_preload"])
    multiprocessing.forkserver.ensure_running()


def prepare() -> None:
    """In the fork server, before it takes requests."""
    die_with_parent()  # its ranks hold the pipe by which it would notice the launcher's end
    announce_fork_server(Path(os.environ[RUNTIME_VARIABLE]))
    from daemon.entry import import_rank

    # Each rank meets the same fault when it imports for itself, and has a log to say it in.
    with contextlib.suppress(Exception):
        import_rank()
