"""The verdict over what the launcher knows of its group."""

from pathlib import Path
from typing import Any

import pytest

from daemon.config import Config
from daemon.group_watch import Look
from daemon.metrics import Metrics
from daemon.stall import Stall
from daemon.vitals import Vitals

CONFIG = Config.model_validate({"models": [{"profile": "tiny-t2v", "path": "/models/tiny-t2v"}]})
FINE = {"trouble": None, "status": "consuming"}
SERVICE = {"serving": True, "draining": None, "in_hand": 0, "consumer": FINE, "publisher": FINE}


class Watch:
    """Stands for a group's watch that has looked just now."""

    def __init__(self, records: list[dict[str, Any]], **known: Any) -> None:
        silent = {record["rank"]: record.pop("silent", 0.1) for record in records}
        nothing: dict[str, Any] = {"dead": [], "stall": None, "looked_seconds_ago": 0.1}
        by_rank = {record["rank"]: record for record in records}
        self._look = Look(records=by_rank, silent=silent, **{**nothing, **known})

    def look(self) -> Look:
        return self._look


def record(rank: int, state: str = "idle", **fields: Any) -> dict[str, Any]:
    known = {"rank": rank, "state": state, "last_progress_age_seconds": 0.0, "stall_limit_seconds": None}
    return {**known, "finishing": None, **({"service": SERVICE} if rank == 0 else {}), **fields}


def judge(*records: dict[str, Any], draining: bool = False, **known: Any) -> tuple[list[str], list[str]]:
    """The reasons against live and against ready."""
    vitals = Vitals(CONFIG, 2)
    vitals.draining = draining
    vitals.group_started(Watch(list(records), **known))  # type: ignore[arg-type]  # it only looks
    view = vitals.view()
    return [each.reason for each in view.live], [each.reason for each in view.ready]


STALL = Stall(rank=1, phase=None, job_id=None, step=None, age_seconds=181.0, limit_seconds=180.0)


@pytest.mark.parametrize(
    ("verdict", "live", "ready"),
    [
        (judge(record(0), record(1)), [], []),
        (judge(record(0)), [], ["starting"]),
        (judge(record(0), record(1, "loading", step=5, steps=10)), [], ["loading"]),
        (judge(record(0, service={}), record(1)), [], ["starting"]),
        (judge(record(0), record(1, silent=16.0)), [], ["rank_silent"]),
        (judge(record(0), record(1, silent=181.0), stall=STALL), ["rank_stalled"], ["rank_stalled"]),
        (judge(record(0), record(1), dead=[1]), [], ["rank_died"]),
        (judge(record(0), record(1), looked_seconds_ago=31.0), ["watch_stopped"], ["watch_stopped"]),
        (judge(record(0), record(1), draining=True), [], ["draining"]),
        (judge(record(0, service={**SERVICE, "draining": "control"}), record(1)), [], ["draining"]),
        (
            judge(
                record(0, service={**SERVICE, "publisher": {"trouble": "blocked", "status": "low memory"}}), record(1)
            ),
            [],
            ["publisher_blocked"],
        ),
    ],
)
def test_a_verdict_has_its_reasons(verdict: tuple[list[str], list[str]], live: list[str], ready: list[str]) -> None:
    """Each way not to be well is named, and only a hang is against being alive."""
    assert verdict == (live, ready)


def test_between_two_groups_it_is_alive_and_says_why_it_waits() -> None:
    """A stall is over with its group; until the next one is there, the launcher's words are the reason."""
    vitals = Vitals(CONFIG, 2)
    assert [each.reason for each in vitals.view().ready] == ["starting"]
    vitals.group_started(Watch([record(0), record(1)], stall=STALL))  # type: ignore[arg-type]  # it only looks
    vitals.group_ended("the group failed with status 1; it starts again in 2 s")
    view = vitals.view()
    assert view.live == []
    assert [each.as_json() for each in view.ready] == [
        {"reason": "restarting", "message": "the group failed with status 1; it starts again in 2 s"}
    ]


def test_the_track_nearest_to_its_limit_stands_for_a_rank() -> None:
    """A finisher that hangs shows, though the main thread of rank 0 goes on."""
    finishing = {"last_progress_age_seconds": 50.0, "stall_limit_seconds": 60.0}
    busy = record(0, "generating", last_progress_age_seconds=2.0, stall_limit_seconds=60.0, finishing=finishing)
    vitals = Vitals(CONFIG, 1)
    vitals.group_started(Watch([{**busy, "silent": 3.0}]))  # type: ignore[arg-type]  # it only looks
    (rank,) = vitals.view().ranks
    assert (rank.progress_age_seconds, rank.stall_limit_seconds) == (53.0, 60.0)


def test_connections_are_judged_once_rank_0_serves(tmp_path: Path) -> None:
    """While it loads, its consumer has not tried yet: no metric says that the broker were gone."""
    vitals = Vitals(CONFIG, 1)
    metrics = Metrics(CONFIG, vitals, tmp_path, world_size=1)
    untried = {"trouble": "disconnected", "status": "not connected yet"}
    service = {**SERVICE, "serving": False, "consumer": untried}
    for serving, lines in (
        (False, []),
        (True, ['reeld_broker_connected{connection="consumer"} 0.0']),
    ):
        known = record(0, "idle" if serving else "loading", step=5, steps=10, service={**service, "serving": serving})
        vitals.group_started(Watch([known]))  # type: ignore[arg-type]  # it only looks
        said = metrics.render(None)[0].decode().splitlines()
        assert [line for line in said if line.startswith('reeld_broker_connected{connection="consumer"}')] == lines
