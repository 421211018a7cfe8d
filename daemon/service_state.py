"""What the service manager is told of this daemon: readiness, its watchdog, more time, and a line of status.

Owns when each is sent. The judgement is the group watch's: what it finds no stall in makes progress, and only then
is the watchdog fed and the start given more time. Leaves out the protocol (`daemon.notify`).
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from daemon.health import STARTING_STATES
from daemon.notify import Notifier
from daemon.step_clock import StepClock

Record = Mapping[str, Any]

# While the ranks load, the start has this long until the next sign of progress; sent far more often.
_EXTENSION_SECONDS = 120
_EXTEND_EVERY_SECONDS = 10.0
_STATUS_EVERY_SECONDS = 1.0


class ServiceState:
    """Tells the manager what the launcher and the group watch see. Without a manager it does nothing."""

    def __init__(self, notifier: Notifier, *, nproc: int) -> None:
        self._notifier = notifier
        self._nproc = nproc
        self._text = StatusText()
        self._ready = False
        self._stopping = False
        self._said = ""
        self._said_at = self._fed_at = self._extended_at = float("-inf")

    def say(self, text: str) -> None:
        """The status line, at once: the launcher does something that no rank has a part in."""
        self._say(text, every_seconds=0)

    def progress(self) -> None:
        """All is well: feeds the watchdog, and gives a start that is not through yet more time."""
        now = time.monotonic()
        watchdog = self._notifier.watchdog_seconds
        if watchdog is not None and now - self._fed_at >= min(2.0, watchdog / 4):
            self._fed_at = now
            self._notifier.send(WATCHDOG=1)
        if not self._ready and not self._stopping and now - self._extended_at >= _EXTEND_EVERY_SECONDS:
            self._extended_at = now
            self._notifier.send(EXTEND_TIMEOUT_USEC=_EXTENSION_SECONDS * 1_000_000)

    def ranks(self, records: Mapping[int, Record]) -> None:
        """Every rank makes progress, and these are their records. Called by the group watch at each of its looks."""
        self.progress()
        if not self._ready and not self._stopping and is_ready(records, self._nproc):
            self._ready = self._notifier.send(READY=1)
        text = self._text.of(records, self._nproc)
        self._say(f"draining; {text}" if self._stopping else text, every_seconds=_STATUS_EVERY_SECONDS)

    def stopping(self, *, within_seconds: float) -> None:
        """The end has begun and takes at most so long, whatever the unit's TimeoutStopSec says. Signal-safe."""
        self._stopping = True
        self._notifier.send(STOPPING=1, EXTEND_TIMEOUT_USEC=int(within_seconds * 1_000_000))

    def _say(self, text: str, *, every_seconds: float) -> None:
        now = time.monotonic()
        if text != self._said and now - self._said_at >= every_seconds:
            self._said, self._said_at = text, now
            self._notifier.send(STATUS=text)


def is_ready(records: Mapping[int, Record], nproc: int) -> bool:
    """Whether every rank has loaded and rank 0 consumes."""
    return (
        len(records) == nproc
        and all(record["state"] not in (*STARTING_STATES, "left") for record in records.values())
        and _consumer(records[0]) == "consuming"
    )


def _consumer(rank0: Record) -> str | None:
    """What rank 0's consumer says of itself; None before it has said anything."""
    status: str | None = rank0.get("service", {}).get("consumer", {}).get("status")
    return status


class StatusText:
    """One line that says what the ranks do. Keeps the pace of the job that runs, for the time left."""

    def __init__(self) -> None:
        self._clock = StepClock()
        self._clocked: tuple[Any, ...] = ()
        self._left: tuple[float, float] | None = None

    def of(self, records: Mapping[int, Record], nproc: int) -> str:
        """The line for these records."""
        rank0 = records.get(0)
        if rank0 is None or len(records) < nproc:
            return f"{names(range(nproc))} starting"
        late = [rank for rank, record in records.items() if record["state"] in ("starting", "joining")]
        if late:
            return f"{names(late)} joining"
        loading = [record for record in records.values() if record["state"] == "loading"]
        if loading:
            return _loading(loading)
        consumer = _consumer(rank0) or "consuming"
        ready = f"{names(records)} ready" if consumer != "stopped" else names(records)
        # With a job in hand it is consumed again only once that is settled, which is no news.
        waits = [] if consumer in ("consuming", "stopped") or consumer.startswith("connected") else [consumer]
        return "; ".join([ready, *waits, *self._work(rank0)] if waits or self._busy(rank0) else [ready, rank0["state"]])

    def _busy(self, rank0: Record) -> bool:
        return bool(rank0.get("job_id") or rank0.get("finishing"))

    def _work(self, rank0: Record) -> list[str]:
        parts = []
        if rank0.get("job_id"):
            parts.append(f"job {rank0['job_id']} {self._step(rank0)}")
        finishing = rank0.get("finishing")
        if finishing:
            parts.append(f"job {finishing['job_id']} finishing")
        return parts

    def _step(self, record: Record) -> str:
        phase, step, steps = record.get("phase"), record.get("step"), record.get("steps")
        if phase != "denoise" or step is None or not steps:
            return str(phase or record["state"])
        now = time.monotonic()
        if self._clocked[:1] != (record["job_id"],):
            self._clock, self._left = StepClock(), None
        if self._clocked != (record["job_id"], step):
            eta = self._clock.tick(phase, step, steps)["eta_seconds"]
            self._left = None if eta is None else (eta, now)
            self._clocked = (record["job_id"], step)
        if self._left is None:
            return f"step {step}/{steps}"
        eta, at = self._left
        return f"step {step}/{steps}, {max(0, round(eta - (now - at)))} s left"


def names(ranks: Sequence[int] | Mapping[int, Any] | range) -> str:
    """The ranks as people write them: one, a range, or a list."""
    found = sorted(ranks)
    if len(found) > 1 and found == list(range(found[0], found[-1] + 1)):
        return f"rank {found[0]}–{found[-1]}"  # noqa: RUF001  a range of numbers has a dash of its own
    return f"rank {', '.join(map(str, found))}"


def _loading(records: Sequence[Record]) -> str:
    """The rank that has read least: the others wait for it."""
    least = min(records, key=lambda record: (record["step"] or 0) / (record["steps"] or 1))
    if not least["steps"]:
        return f"loading {least['work']}"
    return f"loading {least['work']} {100 * (least['step'] or 0) // least['steps']} %"
