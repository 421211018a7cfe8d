"""Measurements: what a rank counts and times, told to the launcher, which keeps the sums (`daemon.metrics`).

They go through a named pipe, one line of JSON each, in one piece because it is shorter than PIPE_BUF. So a rank that
is killed loses none, a group that starts again begins no counter anew, a full disk is no matter, and nothing waits:
when the pipe is full (the launcher is stopped) a measurement is dropped, and counted. Leaves out what is made of them.
"""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from daemon.errors import ErrorCode

PIPE_FILE = "measurements"
_PIPE_BUF = 4096


class Measurements:
    """Tells the launcher. Without a pipe (no endpoint, or a bare torchrun) it tells nobody. For any thread."""

    def __init__(self, runtime: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._dropped = 0
        self._pipe: int | None = None
        if runtime is not None:
            with contextlib.suppress(OSError):  # there is none: nobody asked for metrics
                self._pipe = os.open(runtime / PIPE_FILE, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def job_ended(self, outcome: str, code: ErrorCode | None = None) -> None:
        """A job is settled for good: succeeded, failed with a code, or cancelled."""
        self._tell("jobs", 1, outcome=outcome, code=str(code or ""))

    def job_accepted(self, *, queue_wait_seconds: float | None, redelivered: bool) -> None:
        """A job was begun. The wait is known for a first delivery whose publisher set the AMQP `timestamp`."""
        self._tell("accepted", 1, redelivered=str(redelivered).lower())
        if queue_wait_seconds is not None:
            self._tell("queue_wait", max(0.0, queue_wait_seconds))

    def job_repeated(self) -> None:
        """A delivery was answered from the manifest of a job done before."""
        self._tell("repeated", 1)

    def job_retried(self, level: str, code: ErrorCode) -> None:
        """A job is tried again, `in_place` or over the `ladder`."""
        self._tell("retries", 1, level=level, code=str(code))

    def job_requeued(self) -> None:
        """A job was given back to the queue: not its fault."""
        self._tell("requeued", 1)

    def job_seconds(self, seconds: float) -> None:
        """From the beginning of a job to its ack."""
        self._tell("job", seconds)

    def phase(self, phase: str, seconds: float) -> None:
        """A phase of a job took so long on rank 0."""
        self._tell("phase", seconds, phase=phase)

    def step(self, seconds: float) -> None:
        """A denoising step took so long."""
        self._tell("step", seconds)

    def model_loaded(self, model: str, seconds: float) -> None:
        """Rank 0 has loaded a model."""
        self._tell("load", seconds, model=model)

    def published(self, seconds: float) -> None:
        """A message that must arrive was confirmed so long after it was handed over, waits for the broker included."""
        self._tell("publish", seconds)

    def publish_failed(self) -> None:
        """A try to publish such a message failed; it is tried again."""
        self._tell("publish_failures", 1)

    def acked(self, seconds: float) -> None:
        """An ack went out so long after it was asked for. AMQP does not confirm acks."""
        self._tell("ack", seconds)

    def reconnected(self, connection: str) -> None:
        """The `consumer` or the `publisher` lost its connection and has one again."""
        self._tell("reconnects", 1, connection=connection)

    def _tell(self, name: str, value: float, **labels: str) -> None:
        if self._pipe is None:
            return
        with self._lock:
            line = _line(name, value, labels)
            if self._dropped:
                line = _line("dropped", self._dropped, {}) + line
            try:
                os.write(self._pipe, line)
            except OSError:  # full, or the launcher is gone
                self._dropped += 1
            else:
                self._dropped = 0


def _line(name: str, value: float, labels: dict[str, str]) -> bytes:
    short: dict[str, Any] = {key: label[:200] for key, label in labels.items()}
    line = json.dumps([name, value, short]).encode() + b"\n"
    assert len(line) < _PIPE_BUF // 2
    return line


SILENT = Measurements()
