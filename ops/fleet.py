"""All daemons as the status exchange tells of them: workers, their ranks, and the jobs that are going on.

Owns what is remembered of events, and who counts as silent. Knows nothing but what came since it began to listen.
Leaves out where events come from (`daemon.client`) and how this looks (`ops.top`).
"""

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from daemon.client import EventStream, ReceivedEvent
from daemon.events import TERMINAL

# So many heartbeats may be missed.
_SILENT_HEARTBEATS = 3.0
_DEFAULT_HEARTBEAT_SECONDS = 5.0
_ENDED_KEPT = 50
# A job whose end was not heard: its worker was lost while nobody listened.
_FORGOTTEN_SECONDS = 3600.0


@dataclass(slots=True)
class _Process:
    name: str
    first_at: float
    last_at: float


@dataclass(slots=True)
class Worker:
    """A worker by its last heartbeat. `heard_at` is this process's monotonic clock, in seconds."""

    worker_id: str
    heard_at: float
    heartbeat: dict[str, Any] = field(default_factory=dict)
    life: str = ""
    clock_ahead_seconds: float = 0.0
    _processes: dict[str, _Process] = field(default_factory=dict)

    @property
    def interval_seconds(self) -> float:
        seconds = self.heartbeat.get("heartbeat_seconds")
        return float(seconds) if isinstance(seconds, int | float) and seconds > 0 else _DEFAULT_HEARTBEAT_SECONDS

    def age_seconds(self, now: float) -> float:
        return now - self.heard_at

    def is_silent(self, now: float) -> bool:
        """Whether it should have been heard, and was not. A worker that said it stopped is not silent."""
        return self.life != "stopped" and self.age_seconds(now) > _SILENT_HEARTBEATS * self.interval_seconds

    @property
    def processes(self) -> list[str]:
        """`HOST pid N` of every process that says this worker's id; not of one whose place the last one took."""
        latest = max((each.first_at for each in self._processes.values()), default=0.0)
        return sorted(each.name for each in self._processes.values() if each.last_at >= latest)

    def take_heartbeat(self, data: dict[str, Any], now: float) -> None:
        self.heartbeat = data
        self.life = "draining" if data.get("draining") else ""
        kept = now - _SILENT_HEARTBEATS * self.interval_seconds
        self._processes = {key: each for key, each in self._processes.items() if each.last_at >= kept}
        if (instance := data.get("instance")) is not None:
            name = f"{data.get('host')} pid {data.get('pid')}"
            self._processes.setdefault(str(instance), _Process(name, now, now)).last_at = now

    @property
    def ranks(self) -> list[dict[str, Any]]:
        ranks = self.heartbeat.get("ranks")
        return [rank for rank in ranks if isinstance(rank, dict)] if isinstance(ranks, list) else []


@dataclass(slots=True)
class JobSeen:
    """A job by its last event. `last` is that event's name, `data` what its events said, the later over the earlier."""

    job_id: str
    begun_at: float
    changed_at: float
    last: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.last in TERMINAL


class Fleet:
    """Takes events in, in the order in which they came."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self._jobs: dict[str, JobSeen] = {}

    def take(self, event: ReceivedEvent, *, now: float) -> None:
        """`now` is the monotonic clock when the event came."""
        worker_id = event.data.get("worker_id")
        if event.is_job:
            self._take_job(event, now)
        elif event.routing_key.startswith("worker.") and isinstance(worker_id, str):
            worker = self.workers.setdefault(worker_id, Worker(worker_id, now))
            worker.heard_at = now
            worker.clock_ahead_seconds = _ahead(event.time)
            if event.name == "heartbeat":
                worker.take_heartbeat(event.data, now)
            else:
                worker.life = event.name

    @property
    def pools(self) -> list[str]:
        """The pools of all workers that were heard."""
        found = {str(worker.heartbeat["pool"]) for worker in self.workers.values() if worker.heartbeat.get("pool")}
        return sorted(found)

    @property
    def going_on(self) -> list[JobSeen]:
        """The jobs that have not ended, the longest first."""
        return sorted((job for job in self._jobs.values() if not job.ended), key=lambda job: job.begun_at)

    @property
    def ended(self) -> list[JobSeen]:
        """The jobs that have ended, the latest first."""
        return sorted((job for job in self._jobs.values() if job.ended), key=lambda job: -job.changed_at)

    def _take_job(self, event: ReceivedEvent, now: float) -> None:
        job_id = event.data.get("job_id")
        if not isinstance(job_id, str) or event.name == "cancel_noted":
            return
        job = self._jobs.setdefault(job_id, JobSeen(job_id, now, now))
        job.last, job.changed_at = event.name, now
        # Its phase and its steps are those of one attempt.
        job.data = {**({} if event.name == "accepted" else job.data), **event.data}
        lapsed = [each for each in self.going_on if now - each.changed_at > _FORGOTTEN_SECONDS]
        for old in [*self.ended[_ENDED_KEPT:], *lapsed]:
            del self._jobs[old.job_id]


def hear(stream: EventStream, fleet: Fleet, *, timeout_seconds: float) -> None:
    """Listens until every worker had the time to be heard: one and a half heartbeats after the first of them, of the
    longest interval seen, and at least of the default one.

    Ends after `timeout_seconds` when nobody was heard at all.
    """
    end = time.monotonic() + timeout_seconds
    begun: float | None = None
    while (left := end - time.monotonic()) > 0:
        event = stream.next(left)
        if event is None:
            return
        now = time.monotonic()
        fleet.take(event, now=now)
        if event.name == "heartbeat" and not event.is_job:
            begun = begun or now
            longest = max(worker.interval_seconds for worker in fleet.workers.values())
            end = begun + 1.5 * max(longest, _DEFAULT_HEARTBEAT_SECONDS)


def _ahead(text: str) -> float:
    """By how many seconds the sender's clock is ahead of ours; what the message took on its way counts against it."""
    try:
        return datetime.fromisoformat(text).timestamp() - time.time()
    except ValueError:
        return 0.0
