"""Stall limits, the verdict over a record, stacks as data, and when a group is given up."""

import faulthandler
import tempfile
import threading
from typing import Any

import pytest

from daemon.health import PULSE_BYTES, Pulse, RankState, RecordAges, pulse_path
from daemon.launcher import RestartPolicy
from daemon.sections import StallConfig
from daemon.stall import StallLimits, find_stall, own_stacks, parse_stacks

CONFIG = StallConfig(floor_seconds=5, multiple=10, denoise_seconds=100, stage_seconds=50)


def test_unseen_work_has_the_ceiling() -> None:
    """A phase that was never seen at this shape may compile: its limit is the configuration's."""
    limits = StallLimits(CONFIG)
    limits.learn("denoise", "480x832", 1.0)
    assert limits.limit("denoise", "720x1280") == 100
    assert limits.limit("decode", "480x832") == StallConfig().decode_seconds


def test_limit_is_learned_within_floor_and_ceiling() -> None:
    """The limit is ten times the longest step seen, at least the floor and at most the ceiling."""
    limits = StallLimits(CONFIG)
    limits.learn("denoise", "a", 0.1)
    assert limits.limit("denoise", "a") == 5
    limits.learn("denoise", "a", 2.0)
    limits.learn("denoise", "a", 0.5)
    assert limits.limit("denoise", "a") == 20
    limits.learn("denoise", "a", 60.0)
    assert limits.limit("denoise", "a") == 100


def test_fetching_an_input_is_not_learned() -> None:
    """Quick inputs do not shorten the time that a slow one may take: fetching has deadlines of its own."""
    limits = StallLimits(CONFIG)
    limits.learn("stage", "", 0.01)
    assert limits.limit("stage", "") == 50


def test_memory_of_shapes_is_bounded() -> None:
    """Shapes come from publishers: the oldest is forgotten, and memory stays flat."""
    limits = StallLimits(CONFIG)
    for number in range(1000):
        limits.learn("denoise", str(number), 1.0)
    assert limits.limit("denoise", "999") == 10
    assert limits.limit("denoise", "0") == 100
    assert len(limits._longest) < 300


def _record(**fields: Any) -> dict[str, Any]:
    state = RankState(StallLimits(CONFIG))
    state.set("generating", phase="denoise", work="a", job_id="j", step=3, steps=9)
    return {**state.record(1), **fields}


@pytest.mark.parametrize(
    ("fields", "silent", "phase"),
    [
        ({}, 0, None),
        ({"last_progress_age_seconds": 101.0}, 0, "denoise"),
        ({"last_progress_age_seconds": 95.0}, 6, "denoise"),
        ({"finishing": {"phase": "finish", "job_id": "k", "last_progress_age_seconds": 700.0,
                        "stall_limit_seconds": 600.0}}, 0, "finish"),
        ({"phase": None, "stall_limit_seconds": None, "last_progress_age_seconds": 900.0}, 0, None),
    ],
)  # fmt: skip
def test_stall_is_lack_of_progress(fields: dict[str, Any], silent: float, phase: str | None) -> None:
    """A phase past its limit is a stall, on the main thread or the finisher; a rank that waits for others is none."""
    stall = find_stall(_record(**fields), silent_seconds=silent, silence_limit_seconds=30)
    assert (stall.phase if stall else None) == phase


def test_silence_is_a_stall_in_any_state() -> None:
    """An idle rank whose process says nothing is a stall as well: it may be stopped, or hang with the GIL held."""
    stall = find_stall(_record(state="idle", phase=None), silent_seconds=31, silence_limit_seconds=30)
    assert stall is not None
    assert (stall.rank, stall.phase) == (1, None)


def test_age_is_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that does not change grows old by the reader's clock."""
    now = 0.0
    monkeypatch.setattr("daemon.health.time.monotonic", lambda: now)
    ages = RecordAges()
    now = 7.0
    assert ages.silent_seconds(0, None) == 7
    assert ages.silent_seconds(0, {"sequence": 1}) == 0
    now = 9.0
    assert ages.silent_seconds(0, {"sequence": 1}) == 2
    assert ages.silent_seconds(0, {"sequence": 2}) == 0


def test_pulse_is_written_in_place(tmp_path: Any) -> None:
    """The pulse keeps its size and needs no new space: a full disk does not look like a silent rank."""
    path = pulse_path(tmp_path, 0)
    path.write_bytes(b" " * PULSE_BYTES)
    pulse = Pulse(path)
    pulse.write({"sequence": 1, "state": "x" * 200})
    pulse.write({"sequence": 2})
    assert path.stat().st_size == PULSE_BYTES
    assert path.read_bytes().strip() == b'{"sequence": 2}'


def test_stacks_are_data() -> None:
    """faulthandler's text becomes a list of threads, each with its frames, innermost first."""
    begun, end = threading.Event(), threading.Event()

    def wait_in_here() -> None:
        begun.set()
        end.wait()

    thread = threading.Thread(target=wait_in_here)
    thread.start()
    begun.wait()
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        threads = parse_stacks(file.read().decode())
    assert sum(each["current"] for each in threads) == 1
    assert any("wait_in_here" in frame for each in threads for frame in each["frames"])
    assert any("wait_in_here" in frame for each in own_stacks() for frame in each["frames"])
    end.set()
    thread.join()


def test_group_without_a_finished_job_is_given_up() -> None:
    """The first restart is quick, the next ones ever slower; a finished job starts the count anew; ten in a row end."""
    policy = RestartPolicy()
    pauses = [policy.pause_seconds(ready_seconds=20, jobs_succeeded=0) for _ in range(3)]
    assert pauses == [0, 2, 4]
    assert policy.pause_seconds(ready_seconds=20, jobs_succeeded=1) == 0
    rest = [policy.pause_seconds(ready_seconds=0, jobs_succeeded=0) for _ in range(10)]
    assert rest[-2:] == [30, None]
    assert policy.pause_seconds(ready_seconds=4000, jobs_succeeded=0) == 0
