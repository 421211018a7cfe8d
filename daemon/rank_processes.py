"""A group's processes, known by what each writes of itself into the launcher's runtime folder.

A forked rank has the environment and the command line of the process that it was forked from, so neither tells ranks
apart. Owns these files, finding the processes, and that none outlives the one it came from. Leaves out starting them
(`daemon.fork_server`, `parallel.agent`).
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

import psutil
from setproctitle import setproctitle

from daemon.logs import RUNTIME_VARIABLE
from daemon.parent_death import signal_after_parent

# The launcher's process id, for its ranks. Without it they were started by a bare torchrun.
LAUNCHER_VARIABLE = "REELD_LAUNCHER"
_FORK_SERVER = "fork-server"
_FILE_BYTES = 16


def die_with_parent() -> None:
    """Has the kernel end this process when the one that started it is gone: nobody else would, and ranks hold GPUs.

    A rank's parent is the fork server, the launcher or torchrun; the fork server's is the launcher.
    """
    parent = os.getppid()
    signal_after_parent(signal.SIGKILL)
    if os.getppid() != parent or not _is_expected(parent):  # it died before the call
        print(f"reeld: process {parent} is not the one that started this rank; ending", file=sys.stderr, flush=True)
        os._exit(1)


def _is_expected(parent: int) -> bool:
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None:
        return True  # torchrun does not say who it is, and in a container it may be process 1
    if parent == int(launcher):
        return True
    with contextlib.suppress(OSError, ValueError):
        return parent == int(_pid_path(Path(os.environ[RUNTIME_VARIABLE]), _FORK_SERVER).read_text())
    return False


def announce(runtime: Path, rank: int, world_size: int) -> None:
    """Says which process is this rank. Call it in the rank, first."""
    setproctitle(f"reeld: rank {rank} of {world_size}")
    _put(_pid_path(runtime, _rank_name(rank)), str(os.getpid()))


def announce_fork_server(runtime: Path) -> None:
    """Says which process the ranks are forked from. Call it there."""
    setproctitle("reeld: fork server")
    _put(_pid_path(runtime, _FORK_SERVER), str(os.getpid()))


def announce_exit(runtime: Path, rank: int, status: int) -> None:
    """Says how this rank ends: torchrun's agent reports the first that fails, which need not be to blame."""
    _put(_status_path(runtime, rank), str(status))


def exit_statuses(runtime: Path, world_size: int) -> dict[int, int]:
    """What the ranks of the last group said of their ends, by rank; one that was killed said nothing."""
    found: dict[int, int] = {}
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError):
            found[rank] = int(_status_path(runtime, rank).read_text())
    return found


def forget_ranks(runtime: Path, world_size: int) -> None:
    """Clears the way for the next group. Call it in the launcher."""
    for rank in range(world_size):
        _put(_pid_path(runtime, _rank_name(rank)))
        _put(_status_path(runtime, rank))


def rank_processes(runtime: Path, launcher: psutil.Process | None = None) -> dict[int, psutil.Process]:
    """The living ranks of a launcher (by default this process), by rank."""
    launcher = launcher or psutil.Process()
    found: dict[int, psutil.Process] = {}
    for path in runtime.glob(f"{_rank_name('*')}.pid"):
        process = _living(path, launcher)
        if process is not None:
            found[int(path.stem.rpartition("-")[2])] = process
    return found


def kill_ranks(runtime: Path) -> list[int]:
    """Ends every rank at once; SIGKILL, because a hung or stopped one heeds nothing else. Returns which."""
    processes = rank_processes(runtime)
    for process in processes.values():
        with contextlib.suppress(psutil.Error):
            process.kill()
    return list(processes)


def fork_server_process(runtime: Path, launcher: psutil.Process | None = None) -> psutil.Process | None:
    """The process that a launcher's ranks (by default this process's) are forked from; None when there is none now."""
    return _living(_pid_path(runtime, _FORK_SERVER), launcher or psutil.Process())


def kill_fork_server(runtime: Path) -> None:
    """Ends it, and with it any rank that is left. The next rank gets a new one."""
    process = fork_server_process(runtime)
    if process is not None:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _living(path: Path, launcher: psutil.Process) -> psutil.Process | None:
    """The process that a file names; None when it has ended, even if its number is another's by now."""
    try:
        process = psutil.Process(int(path.read_text()))
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process if launcher in process.parents() else None
    except (OSError, ValueError, psutil.Error):
        return None


def _put(path: Path, text: str = "") -> None:
    """Over what is there, so that a disk that filled up meanwhile does not look like a rank that is gone."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, text.encode().ljust(_FILE_BYTES))
    finally:
        os.close(descriptor)


def _rank_name(rank: object) -> str:
    return f"rank-{rank}"


def _pid_path(runtime: Path, name: str) -> Path:
    return runtime / f"{name}.pid"


def _status_path(runtime: Path, rank: int) -> Path:
    return runtime / f"{_rank_name(rank)}.status"
