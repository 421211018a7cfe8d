"""The daemons of a storm, each started again when it has ended, as systemd would.

Owns their configurations and processes. Leaves out what is done to them (`tests.storm.faults`).
"""

import contextlib
import shutil
import signal
import time
from pathlib import Path

import psutil

from daemon.rank_processes import fork_server_process
from ops.local_daemons import LocalDaemon, find_daemon
from tests.harness import Worker, write_config
from tests.history import LOGS

_RESTART_SECONDS = 1.0  # the unit's RestartSec=
_NO_RESTART = (77, 78)  # its RestartPreventExitStatus=


class Daemon:
    """One `reeld run` that is kept running."""

    def __init__(self, config: Path, url: str, logs: Path, *, ranks: int, worker_id: str) -> None:
        self._config, self._url, self._logs = config, url, logs
        self.ranks, self.worker_id = ranks, worker_id
        self.starts = 0
        self.statuses: list[int] = []
        self._worker: Worker | None = None
        self._start_at = 0.0

    def keep(self) -> None:
        """Starts it when it is not running. Call it often. Fails when it ended in a way that no restart mends."""
        if self._worker is not None and (status := self._worker.process.poll()) is not None:
            self.statuses.append(status)
            assert status not in _NO_RESTART, f"{self.worker_id} ended with {status}\n{self._worker.tail()}"
            self._worker.end()
            self._worker, self._start_at = None, time.monotonic() + _RESTART_SECONDS
        if self._worker is None and time.monotonic() >= self._start_at:
            self._worker = Worker(self._config, self._url, self._logs)
            self.starts += 1

    def signal_launcher(self, number: signal.Signals) -> bool:
        """False when it is not running just now."""
        if self._worker is None or self._worker.process.poll() is not None:
            return False
        self._worker.process.send_signal(number)
        return True

    def launcher(self) -> psutil.Process | None:
        """The launcher's process; None when there is none just now."""
        return None if self._worker is None else psutil.Process(self._worker.process.pid)

    def rank(self, rank: int) -> psutil.Process | None:
        """The process of a rank; None when there is none just now."""
        daemon = self._found()
        return None if daemon is None else daemon.ranks.get(rank)

    def fork_server(self) -> psutil.Process | None:
        """The process that its ranks are forked from; None when there is none just now."""
        daemon = self._found()
        return None if daemon is None else fork_server_process(daemon.runtime, daemon.launcher)

    def _found(self) -> LocalDaemon | None:
        if self._worker is None or self._worker.process.poll() is not None:
            return None
        with contextlib.suppress(psutil.Error):
            return find_daemon(self._worker.process.pid)
        return None

    def stop(self, *, timeout_seconds: float) -> int | None:
        """Drains it for good. Its exit status; None when it was not running."""
        if self._worker is None:
            return None
        try:
            return self._worker.drain(timeout_seconds)
        finally:
            self._worker.end()
            self._worker = None

    def end(self) -> None:
        """Ends what is left of it, whatever it does."""
        if self._worker is not None:
            self._worker.end()


def make_daemon(folder: Path, models: Path, url: str, *, number: int, ranks: int) -> Daemon:
    """A daemon of the fleet: its own work directory and id, the pool's output directory."""
    worker_id = f"daemon-{number}"
    own = folder / worker_id
    own.mkdir()
    config = write_config(
        own,
        models,
        nproc=ranks,
        topology="retry_delays_seconds = [1, 2, 4]",
        extra="[broker]\nheartbeat_seconds = 5\nconfirm_timeout_seconds = 5\n"
        "backoff_initial_seconds = 0.2\nbackoff_max_seconds = 2\n"
        "[stall]\nfloor_seconds = 20\nsilence_seconds = 25\njoin_seconds = 120\n",
    )
    text = config.read_text().replace('worker_id = "tester"', f'worker_id = "{worker_id}"')
    text = text.replace(f'directory = "{own}/output"', f'directory = "{folder}/output"')
    text = text.replace(f'roots = ["{own}"]', f'roots = ["{folder}"]')
    text = text.replace("outcome_grace_seconds = 10", "outcome_grace_seconds = 5")
    config.write_text(text)
    return Daemon(config, url, folder / LOGS, ranks=ranks, worker_id=worker_id)


def tiny_models(folder: Path) -> Path:
    """The tiny models in `folder`, written in a process of their own (it needs torch) unless they are there."""
    import subprocess
    import sys

    if not (folder / "tiny-i2v").exists():
        script = "import sys; from pathlib import Path; from parallel.tiny import write_tiny_model; "
        script += "write_tiny_model(Path(sys.argv[1]))"
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        subprocess.run([sys.executable, "-c", script, str(part)], check=True, capture_output=True)
        part.rename(folder)
    return folder
