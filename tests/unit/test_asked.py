"""What people ask of the daemon: drains, cancels, how long they are remembered, and the waits they cut short."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from daemon.asked import DRAINED_BY_MESSAGE, Asked
from daemon.cancellations import Cancellations
from daemon.errors import JobCancelled, JobHandedBack
from parallel.outcome import Stop

# Looking an id up is where the main thread is interrupted: exactly then somebody cancels a job, and asks to drain.
_INTERRUPTED = """
import signal, sys, threading
from pathlib import Path
from daemon.asked import Asked
from daemon.cancellations import Cancellations

asked = Asked(Cancellations(Path(sys.argv[1]), memory_seconds=60), drain_seconds=60)
signal.signal(signal.SIGTERM, lambda number, frame: asked.drain("SIGTERM"))

consumer = threading.Thread(target=asked.cancel, args=("b",), daemon=True)

class LookedUp(str):
    def __hash__(self):
        if consumer.ident is None:
            consumer.start()
            consumer.join(0.5)  # until it has ended, or waits for a lock
            signal.raise_signal(signal.SIGTERM)
        return super().__hash__()

if sys.argv[2] == "asked":
    asked.stop(LookedUp("a"))
elif sys.argv[2] == "paused":
    asked.pause(0, LookedUp("a"))
else:
    asked.cancelled.forget(LookedUp("a"))
consumer.join()
print(asked.drain_reason, "b" in asked.cancelled)
"""


def _cancellations(folder: Path, seconds: float = 60) -> Cancellations:
    return Cancellations(folder / "cancelled.jsonl", memory_seconds=seconds)


def test_cancel_outlives_the_process(tmp_path: Path) -> None:
    """A cancelled job that was not met yet is known to the next process as well; one that ended otherwise is not."""
    first = _cancellations(tmp_path)
    first.add("a")
    first.add("b")
    first.forget("b")
    first.add("d").result()
    second = _cancellations(tmp_path)
    assert ("a" in second, "b" in second, "c" in second) == (True, False, False)


def test_cancel_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel is forgotten after its time, in memory and in the file."""
    now = 1000.0
    monkeypatch.setattr("daemon.cancellations.time.time", lambda: now)
    cancelled = _cancellations(tmp_path, seconds=10)
    cancelled.add("a").result()
    now = 1009.0
    assert "a" in cancelled
    now = 1011.0
    assert "a" not in cancelled
    _cancellations(tmp_path)
    assert (tmp_path / "cancelled.jsonl").read_text() == ""


def test_file_of_cancels_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cancel adds a line; a process that lives for months keeps its file at twice what it remembers, at most."""
    monkeypatch.setattr("daemon.cancellations._IDS_REMEMBERED", 10)
    cancelled = _cancellations(tmp_path)
    cancelled.add("first")
    for number in range(200):
        kept = cancelled.add(f"{number % 3}")
        cancelled.forget(f"{number % 3}")
        kept.result()
        assert len((tmp_path / "cancelled.jsonl").read_text().splitlines()) <= 20
    assert "first" in _cancellations(tmp_path)


def test_memory_of_cancels_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancels come from anybody: past the bound the oldest is forgotten."""
    monkeypatch.setattr("daemon.cancellations._IDS_REMEMBERED", 3)
    cancelled = _cancellations(tmp_path)
    for job_id in "abcd":
        cancelled.add(job_id)
    assert [job_id in cancelled for job_id in "abcd"] == [False, True, True, True]


def test_torn_line_is_left_out(tmp_path: Path) -> None:
    """A process that was killed while it wrote leaves half a line; the others count."""
    _cancellations(tmp_path).add("a").result()
    with (tmp_path / "cancelled.jsonl").open("a") as file:
        file.write('{"job_id": "b", "unt')
    reread = _cancellations(tmp_path)
    assert ("a" in reread, "b" in reread) == (True, False)
    assert [json.loads(line)["job_id"] for line in (tmp_path / "cancelled.jsonl").read_text().splitlines()] == ["a"]


def test_unwritable_folder_keeps_cancels_in_memory(tmp_path: Path) -> None:
    """A full or missing disk does not lose the cancel of a job that runs."""
    cancelled = Cancellations(tmp_path / "missing" / "cancelled.jsonl", memory_seconds=60)
    cancelled.add("a").result()
    assert "a" in cancelled


def test_first_drain_goes_on_second_hands_back(tmp_path: Path) -> None:
    """Asked once to drain, the job in hand goes on; asked twice, it stops before its next step."""
    asked = Asked(_cancellations(tmp_path), drain_seconds=60)
    assert asked.stop("a") is Stop.NO
    asked.drain("SIGTERM")
    assert (asked.drain_reason, asked.stop("a")) == ("SIGTERM", Stop.NO)
    asked.drain("again")
    assert (asked.drain_reason, asked.stop("a")) == ("SIGTERM", Stop.HAND_BACK)


def test_drain_past_its_limit_hands_back(tmp_path: Path) -> None:
    """A drain that takes longer than its limit stops the job."""
    asked = Asked(_cancellations(tmp_path), drain_seconds=0)
    asked.drain("SIGTERM")
    assert asked.stop("a") is Stop.HAND_BACK


@pytest.mark.parametrize("wish", ["cancel", "second drain", "drain limit"])
def test_wish_cuts_a_pause_short(tmp_path: Path, wish: str) -> None:
    """A pause between two tries ends with what was asked meanwhile."""
    asked = Asked(_cancellations(tmp_path), drain_seconds=0.2 if wish == "drain limit" else 60)
    ended: list[type[Exception]] = []

    def wait() -> None:
        try:
            asked.pause(3600, "a")
        except (JobCancelled, JobHandedBack) as error:
            ended.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    asked.drain("SIGTERM")
    if wish == "cancel":
        asked.cancel("a")
    elif wish == "second drain":
        asked.drain("SIGTERM")
    thread.join(30)
    assert ended == [JobCancelled if wish == "cancel" else JobHandedBack]


def test_pause_without_a_wish_lasts(tmp_path: Path) -> None:
    """A pause that nobody cuts short ends without an error; the cancel of another job is none."""
    asked = Asked(_cancellations(tmp_path), drain_seconds=60)
    asked.cancel("b")
    begun = time.monotonic()
    asked.pause(0.1, "a")
    assert time.monotonic() - begun >= 0.1


@pytest.mark.parametrize(
    ("wishes", "hands_back"),
    [
        (["SIGTERM"], False),
        (["SIGTERM", "SIGTERM"], True),
        ([DRAINED_BY_MESSAGE, DRAINED_BY_MESSAGE], False),
        ([DRAINED_BY_MESSAGE, "SIGTERM"], False),
        (["SIGTERM", DRAINED_BY_MESSAGE], False),
        ([DRAINED_BY_MESSAGE, "SIGTERM", "SIGTERM"], True),
    ],
)
def test_only_a_second_signal_hands_the_job_back(tmp_path: Path, wishes: list[str], hands_back: bool) -> None:
    """A drain message may come again, and a stop may follow it: neither takes the job away."""
    asked = Asked(_cancellations(tmp_path), drain_seconds=60)
    for wish in wishes:
        asked.drain(wish)
    assert asked.must_hand_back() is hands_back
    assert asked.drain_reason in wishes


@pytest.mark.parametrize("where", ["asked", "paused", "forgets"])
def test_a_drain_and_a_cancel_at_once_hold_nobody_up(tmp_path: Path, where: str) -> None:
    """The signal's handler runs in the main thread, wherever that is, while the consumer's thread takes a cancel."""
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "cancelled.jsonl"), where]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["SIGTERM", "True"]
