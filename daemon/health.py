"""Health: what every rank says of itself, and rank 0's heartbeat for all of them.

Owns the rank's state (written by the main thread, read by the health thread) and the heartbeat's content.
Liveness means progress: the age of the last progress is what counts, not that this thread still ticks.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

log = structlog.get_logger("health")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    state: str
    phase: str | None
    job_id: str | None
    step: int | None
    steps: int | None
    progress_at: float


class RankState:
    """What one rank is doing now. Written by its main thread; every change is progress."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = _Snapshot(
            state="joining", phase=None, job_id=None, step=None, steps=None, progress_at=time.monotonic()
        )

    def set(
        self,
        state: str,
        *,
        phase: str | None = None,
        job_id: str | None = None,
        step: int | None = None,
        steps: int | None = None,
    ) -> None:
        with self._lock:
            self._now = _Snapshot(
                state=state, phase=phase, job_id=job_id, step=step, steps=steps, progress_at=time.monotonic()
            )

    def record(self, rank: int) -> dict[str, Any]:
        """The state as JSON. An idle rank makes no progress and needs none: its age is 0."""
        with self._lock:
            now = self._now
        age = 0.0 if now.state == "idle" else time.monotonic() - now.progress_at
        return {
            "rank": rank,
            "state": now.state,
            "phase": now.phase,
            "job_id": now.job_id,
            "step": now.step,
            "steps": now.steps,
            "last_progress_age_seconds": round(age, 3),
        }


class Board(Protocol):
    """Where the ranks leave their records (`parallel.world.HealthBoard`)."""

    def write(self, record: dict[str, Any]) -> None: ...

    def read_all(self) -> list[dict[str, Any] | None]: ...


class HealthThread:
    """Writes this rank's record every `interval_seconds`; on rank 0 also publishes all ranks' records."""

    def __init__(
        self,
        *,
        rank: int,
        state: RankState,
        board: Board,
        memory: Callable[[], dict[str, int]],
        interval_seconds: float,
        publish: Callable[[list[dict[str, Any]]], None] | None,
    ) -> None:
        self._rank = rank
        self._state = state
        self._board = board
        self._memory = memory
        self._interval = interval_seconds
        self._publish = publish
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        sequence = 0
        while not self._stop.is_set():
            sequence += 1
            try:
                self._board.write({**self._state.record(self._rank), **self._memory(), "sequence": sequence})
                if self._publish is not None:
                    self._publish(self._read())
            except RuntimeError as error:
                # The store lives in the launcher or in rank 0; without it the group is ending.
                log.warning("health_store_gone", reason=str(error).splitlines()[0])
                return
            self._stop.wait(self._interval)

    def _read(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        ranks: list[dict[str, Any]] = []
        for rank, record in enumerate(self._board.read_all()):
            if record is None:
                ranks.append({"rank": rank, "state": "unknown"})
                continue
            previous = self._seen.get(rank)
            if previous is None or previous[0]["sequence"] != record["sequence"]:
                self._seen[rank] = (record, now)
            # A rank that stopped writing grows old by rank 0's clock, not by its own.
            silent = now - self._seen[rank][1]
            shown = {key: value for key, value in record.items() if key != "sequence"}
            if silent > 2 * self._interval:
                shown["last_progress_age_seconds"] = round(record["last_progress_age_seconds"] + silent, 3)
            ranks.append(shown)
        return ranks
