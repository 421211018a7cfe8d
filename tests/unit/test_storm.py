"""What of storm and soak needs no broker: schedules come from their seed, and growth is seen."""

from dataclasses import replace
from typing import Any

import pytest

from daemon.errors import PermanentJobError
from daemon.job import parse_job_message
from tests.storm.schedule import FAULT_KINDS, JOB_KINDS, draw_schedule
from tests.storm.soak import Curve, Sample, curves_of


def test_one_seed_is_one_schedule() -> None:
    """The same seed and sizes give the same jobs and faults, to the byte; another seed gives others."""
    first = draw_schedule(7, jobs=200, faults=40, daemons=2, image="data:,")
    assert draw_schedule(7, jobs=200, faults=40, daemons=2, image="data:,") == first
    assert draw_schedule(8, jobs=200, faults=40, daemons=2, image="data:,") != first


def test_a_long_storm_has_every_kind_of_job_and_fault() -> None:
    """1,000 jobs and 200 faults leave no kind out, and each fault comes while there are jobs."""
    schedule = draw_schedule(1, jobs=1000, faults=200, daemons=2, image="data:,")
    assert {job.kind for job in schedule.jobs} == JOB_KINDS.keys()
    assert {fault.kind for fault in schedule.faults} == FAULT_KINDS.keys()
    assert all(0 < fault.after_jobs < 1000 for fault in schedule.faults)
    slow = sum(
        fault.kind in ("fork server killed", "launcher killed", "drained", "drained twice") for fault in schedule.faults
    )
    assert slow <= 20, "each costs ten seconds of imports"


def test_jobs_are_what_their_kind_says() -> None:
    """Good kinds are good jobs, bad kinds are not: a storm of nothing but refusals would prove little."""
    for job in draw_schedule(3, jobs=400, faults=1, daemons=1, image="data:,").jobs:
        for body, message_id in job.messages:
            try:
                parsed = parse_job_message(body, max_body_bytes=1 << 20)
            except PermanentJobError:
                assert job.kind in ("malformed", "not JSON"), job
            else:
                assert job.kind != "not JSON"
                assert parsed.job_id == message_id or job.kind == "without an id"


def sample(seconds: float, rss: int = 1000, threads: int = 10, fds: int = 20) -> Sample:
    return Sample(seconds=seconds, process="rank 0", rss_bytes=rss, threads=threads, fds=fds)


STEADY = [sample(second) for second in range(100)]


def test_a_steady_process_is_flat() -> None:
    """What grows during the warm-up does not count."""
    warm = [replace(each, rss_bytes=500 + 5 * int(each.seconds)) if each.seconds < 20 else each for each in STEADY]
    (curve,) = curves_of(warm, until_seconds=100)
    assert curve.flat
    assert curve.rss_growth == 0


@pytest.mark.parametrize("change", [{"rss_bytes": 1021}, {"threads": 11}, {"fds": 21}])
def test_growth_is_seen(change: dict[str, Any]) -> None:
    """More than 2 % of memory, one thread or one descriptor at the end is growth."""
    (curve,) = curves_of([replace(each, **change) if each.seconds > 60 else each for each in STEADY], until_seconds=100)
    assert not curve.flat


def test_a_process_seen_too_seldom_has_no_curve() -> None:
    """Two samples are no evidence of anything."""
    with pytest.raises(ValueError, match="too short"):
        curves_of(STEADY[:40], until_seconds=100)


def test_a_curve_within_its_bound_is_flat() -> None:
    """2 % are allowed: allocators breathe."""
    assert Curve("rank 0", 1000, 1020, 10, 10, 20, 19).flat
