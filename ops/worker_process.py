"""A `reeld run` of our own: started, watched and stopped.

Owns the process for the demo. Leaves out what the worker does.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from daemon.parent_death import child_gets
from ops.failure import CommandFailedError


class WorkerProcess:
    """A worker in a session of its own, which prints to `log_path`. It is drained if this process dies."""

    def __init__(self, config_path: Path, log_path: Path, *, environment: dict[str, str]) -> None:
        self.log_path = log_path
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ops.cli", "run", "--config", str(config_path)],
                env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours: we stop the worker in order
                preexec_fn=child_gets(signal.SIGTERM),
            )

    def check_alive(self) -> None:
        """Raises CommandFailedError with the end of the log when the worker is gone."""
        status = self._process.poll()
        if status is not None:
            raise CommandFailedError(
                f"the worker exited with status {status}; the end of {self.log_path}:\n{self.tail()}"
            )

    def stop(self, *, timeout_seconds: float) -> int:
        """Drains the worker with SIGTERM and returns its exit status; kills it when it takes too long."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise CommandFailedError(
                f"the worker did not stop in {timeout_seconds:g} s; end of {self.log_path}:\n{self.tail()}"
            ) from None

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.stop(timeout_seconds=20)
