"""Health: what every rank says of itself, and rank 0's heartbeat for all of them.

Owns the rank's state (written by its threads, read by the health thread), its pulse for the launcher, and the
heartbeat's content. Liveness means progress: the age of the last progress is what counts, not that this thread
still ticks. Leaves out how long a phase may take (`daemon.stall`).
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from daemon.stall import StallLimits, find_stall

log = structlog.get_logger("health")

# The launcher makes the files in full before the ranks start, and they are written over in place: a disk that filled
# up meanwhile must not look like a rank that fell silent.
PULSE_BYTES = 4096

# A rank's states before it can take part in a job.
STARTING_STATES = ("starting", "joining", "loading")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    state: str
    phase: str | None = None
    work: str = ""
    job_id: str | None = None
    step: int | None = None
    steps: int | None = None
    progress_at: float


class _Track:
    """What one thread of work does now. Every `set` is progress; what it took is learned."""

    def __init__(self, state: str, limits: StallLimits) -> None:
        self._lock = threading.Lock()
        self._limits = limits
        self._now = _Snapshot(state=state, progress_at=time.monotonic())

    def set(self, state: str, **fields: Any) -> None:
        now = time.monotonic()
        with self._lock:
            before, self._now = self._now, _Snapshot(state=state, progress_at=now, **fields)
        if before.phase is not None:
            self._limits.learn(before.phase, before.work, now - before.progress_at)

    def record(self) -> dict[str, Any]:
        """As JSON. What has no phase waits for others: it makes no progress and needs none, so its age is 0."""
        with self._lock:
            now = self._now
        watched = now.phase is not None
        return {
            "state": now.state,
            "phase": now.phase,
            "work": now.work,
            "job_id": now.job_id,
            "step": now.step,
            "steps": now.steps,
            "last_progress_age_seconds": round(time.monotonic() - now.progress_at, 3) if watched else 0.0,
            "stall_limit_seconds": self._limits.limit(now.phase, now.work) if now.phase is not None else None,
        }


class RankState:
    """What one rank is doing now: its main thread, and on rank 0 the finisher beside it."""

    def __init__(self, limits: StallLimits) -> None:
        self._main = _Track("starting", limits)
        self._finisher = _Track("idle", limits)
        self._settled = 0

    def set(
        self,
        state: str,
        *,
        phase: str | None = None,
        work: str = "",
        job_id: str | None = None,
        step: int | None = None,
        steps: int | None = None,
    ) -> None:
        """The main thread made progress. With a `phase` it must make more within that phase's stall limit.

        `work` says what decides how long the phase takes (a model at a shape).
        """
        self._main.set(state, phase=phase, work=work, job_id=job_id, step=step, steps=steps)

    def finishing(self, job_id: str | None, *, phase: str | None = None, work: str = "") -> None:
        """The finisher made progress; with no job it waits for one, with no phase it waits for the broker."""
        self._finisher.set("finishing" if job_id else "idle", phase=phase, work=work, job_id=job_id)

    def succeeded(self) -> None:
        """A job was acked with its video."""
        self._settled += 1

    def record(self, rank: int) -> dict[str, Any]:
        """The state as JSON."""
        finishing = self._finisher.record()
        return {
            "rank": rank,
            **self._main.record(),
            "finishing": finishing if finishing["job_id"] else None,
            "jobs_succeeded": self._settled,
        }


class Board(Protocol):
    """Where the ranks leave their records (`parallel.world.HealthBoard`)."""

    def write(self, record: dict[str, Any]) -> None: ...

    def read_all(self) -> list[dict[str, Any] | None]: ...


def pulse_path(runtime: Path, rank: int) -> Path:
    """Where a rank writes its record for the launcher."""
    return runtime / f"pulse-{rank}"


class Pulse:
    """This rank's record in a file that the launcher reads: it sees a rank that hangs with all its threads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, record: dict[str, Any]) -> None:
        os.pwrite(self._descriptor, json.dumps(record).encode().ljust(PULSE_BYTES), 0)


class RecordAges:
    """How long each rank has said nothing new, by the reader's own clock."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}

    def silent_seconds(self, rank: int, record: dict[str, Any] | None) -> float:
        """Call it with each record read; None for a rank that has not said anything yet."""
        now = time.monotonic()
        if record is None:
            return now - self._begun
        sequence, since = self._seen.get(rank, (-1, now))
        if sequence != record["sequence"]:
            since = now
            self._seen[rank] = (record["sequence"], now)
        return now - since


class HealthThread:
    """Writes this rank's record every `interval_seconds`; on rank 0 also publishes all ranks' records.

    `on_stall` is called in each rank once some rank makes no progress, where no launcher watches (bare torchrun).
    """

    def __init__(
        self,
        *,
        rank: int,
        state: RankState,
        pulse: Pulse | None,
        interval_seconds: float,
        silence_seconds: float,
        join_seconds: float,
        on_stall: Callable[[], None],
    ) -> None:
        self._rank = rank
        self._state = state
        self._pulse = pulse
        self._interval = interval_seconds
        self._silence = silence_seconds
        self._join = join_seconds
        self._on_stall = on_stall
        self._ages = RecordAges()
        self._sequence = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        # Set by the rank once it has joined.
        self.board: Board | None = None
        self.memory: Callable[[], dict[str, int]] = dict
        self.publish: Callable[[list[dict[str, Any]]], None] | None = None
        # What else the pulse says: on rank 0, of its broker and its work.
        self.for_launcher: Callable[[], dict[str, Any]] = dict

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. The launcher reads the last state."""
        self._stop.set()
        self._thread.join(timeout=5)
        self._beat()

    def _run(self) -> None:
        while not self._stop.is_set():
            record = self._beat()
            try:
                if self.board is not None:
                    self._share(self.board, record)
            except RuntimeError as error:
                # The store lives in the launcher or in rank 0; without it the group is ending. The pulse goes on.
                log.warning("health_store_gone", reason=str(error).splitlines()[0])
                self.board = None
            self._stop.wait(self._interval)

    def _beat(self) -> dict[str, Any]:
        self._sequence += 1
        record = {**self._state.record(self._rank), **self.memory(), "sequence": self._sequence}
        if self._pulse is not None:
            self._pulse.write({**record, **self.for_launcher()})
        return record

    def _share(self, board: Board, record: dict[str, Any]) -> None:
        board.write(record)
        if self._pulse is not None and self.publish is None:
            return  # the launcher watches, and a peer publishes nothing
        ranks: list[dict[str, Any]] = []
        for rank, read in enumerate(board.read_all()):
            silent = self._ages.silent_seconds(rank, read)
            limit = self._silence if read is not None else self._join
            known = read or {"rank": rank, "state": "unknown"}
            if self._pulse is None and (stall := find_stall(known, silent_seconds=silent, silence_limit_seconds=limit)):
                log.error("stalled", stalled_rank=stall.rank, **{k: v for k, v in asdict(stall).items() if k != "rank"})
                self._on_stall()
            shown = {key: value for key, value in known.items() if key not in ("sequence", "jobs_succeeded", "work")}
            if read is not None and silent > 2 * self._interval:
                # A rank that stopped writing grows old by the reader's clock, not by its own.
                shown["last_progress_age_seconds"] = round(read["last_progress_age_seconds"] + silent, 3)
            ranks.append(shown)
        if self.publish is not None:
            self.publish(ranks)
