"""Vitals: whether this service is alive, and whether it can take a job now, each with its reasons.

Owns the verdict, over what the launcher knows of its group: every rank's last record, how old that is, and what rank 0
says of its broker. The launcher judges, because it still answers when a rank hangs. Leaves out how a stall is found
(`daemon.stall`), what is done about it (`daemon.group_watch`), and telling the verdict (`daemon.endpoint`).
"""

import threading
from dataclasses import asdict, dataclass, field
from typing import Any

from daemon.config import Config
from daemon.group_watch import GroupWatch
from daemon.health import STARTING_STATES
from daemon.stall import Stall

# A record older than this many heartbeats says nothing of now.
_HEARTBEATS_MISSED = 3
_LEAST_SILENCE_SECONDS = 10.0
# The watch looks every half second; it pauses while it ends a group, and then says so.
_WATCH_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a verdict is no. `reason` is from a closed list (docs/observability.md), `message` is for people."""

    reason: str
    message: str
    rank: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A rank as it is known now. Its progress age and stall limit, in seconds, are of its track nearest to a stall."""

    rank: int
    record: dict[str, Any]
    silent_seconds: float
    progress_age_seconds: float
    stall_limit_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is known at one moment."""

    ranks: list[Rank] = field(default_factory=list)
    unheard: list[int] = field(default_factory=list)
    service: dict[str, Any] = field(default_factory=dict)
    """What rank 0 last said of its broker and its work (`daemon.rank`); empty before it has."""
    live: list[Reason] = field(default_factory=list)
    ready: list[Reason] = field(default_factory=list)


class Vitals:
    """What the launcher notes of its group, and the verdict. For any thread."""

    def __init__(self, config: Config, world_size: int) -> None:
        self._silence = max(_LEAST_SILENCE_SECONDS, _HEARTBEATS_MISSED * config.heartbeat_seconds)
        self._world_size = world_size
        self._lock = threading.Lock()
        self._watch: GroupWatch | None = None
        self._between = Reason("starting", "the launcher has not started the ranks yet")
        self.draining = False
        """Set by the launcher's signal handler."""

    def group_started(self, watch: GroupWatch) -> None:
        with self._lock:
            self._watch = watch

    def group_ended(self, why: str) -> None:
        """Between two groups, or after the last."""
        with self._lock:
            self._watch = None
            self._between = Reason("restarting", why)

    def view(self) -> View:
        """The verdict now: live and ready are the reasons against, empty when there are none."""
        with self._lock:
            watch, between = self._watch, self._between
        draining = [Reason("draining", "finishes its job, and takes no other")] if self.draining else []
        if watch is None:
            return View(unheard=list(range(self._world_size)), ready=[between, *draining])
        now = watch.look()
        ranks = [_rank(number, record, now.silent[number]) for number, record in now.records.items()]
        live = []
        if now.stall is not None:
            live.append(_stalled(now.stall))
        if now.looked_seconds_ago > _WATCH_SECONDS:
            live.append(Reason("watch_stopped", f"the launcher last looked {now.looked_seconds_ago:.0f} s ago"))
        service: dict[str, Any] = now.records.get(0, {}).get("service") or {}
        unheard = [rank for rank in range(self._world_size) if rank not in now.records]
        died = [
            Reason("rank_died", "its process has ended; the group is being started again", each) for each in now.dead
        ]
        ready = [*live, *died, *self._not_ready(ranks, unheard, service, stalled=bool(live))]
        if service.get("draining") and not draining:
            draining = [Reason("draining", f"asked to by {service['draining']}: takes no other job")]
        return View(ranks=ranks, unheard=unheard, service=service, live=live, ready=[*ready, *draining])

    def _not_ready(
        self, ranks: list[Rank], unheard: list[int], service: dict[str, Any], *, stalled: bool
    ) -> list[Reason]:
        reasons = [Reason("starting", "has said nothing yet", rank) for rank in unheard]
        for each in ranks:
            state = each.record["state"]
            if state in STARTING_STATES:
                reasons.append(Reason("loading", _loading(each.record), each.rank))
            elif state == "left":
                reasons.append(Reason("left", "has left the group", each.rank))
            if each.silent_seconds > self._silence and not stalled:
                text = f"has said nothing for {each.silent_seconds:.0f} s; not yet past its stall limit"
                reasons.append(Reason("rank_silent", text, each.rank))
        if reasons:
            return reasons  # rank 0 speaks to its broker once it has loaded
        if not service.get("serving"):
            return [Reason("starting", "rank 0 does not take jobs yet", 0)]
        return [
            Reason(f"{connection}_{service[connection]['trouble']}", service[connection]["status"])
            for connection in ("consumer", "publisher")
            if service[connection]["trouble"]
        ]


def _rank(number: int, record: dict[str, Any], silent: float) -> Rank:
    """The track that is nearest to its limit stands for the rank; one that waits for others has no age."""
    tracks = [record, *filter(None, [record.get("finishing")])]
    watched = [track for track in tracks if track["stall_limit_seconds"] is not None]
    worst = max(watched, key=lambda t: t["last_progress_age_seconds"] / t["stall_limit_seconds"], default=None)
    return Rank(
        rank=number,
        record=record,
        silent_seconds=silent,
        # What waits for others needs no progress; only a rank that no longer says so grows old.
        progress_age_seconds=(worst["last_progress_age_seconds"] if worst else 0.0) + silent,
        stall_limit_seconds=worst["stall_limit_seconds"] if worst else None,
    )


def _stalled(stall: Stall) -> Reason:
    doing = f"no progress in its phase {stall.phase}" if stall.phase else "its process has said nothing"
    text = (
        f"{doing} for {stall.age_seconds:.0f} s (limit {stall.limit_seconds:.0f} s); the group is being started again"
    )
    return Reason("rank_stalled", text, stall.rank)


def _loading(record: dict[str, Any]) -> str:
    done, total = record.get("step"), record.get("steps")
    if record["state"] != "loading" or not total:
        return str(record["state"])
    return f"loading the model: {100 * (done or 0) / total:.0f} % of {total / 1e9:.1f} GB"
