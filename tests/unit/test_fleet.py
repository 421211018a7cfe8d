"""What `reeld top` remembers of events, and how it tells it."""

import io
import json

from rich.console import Console

from daemon.client import ReceivedEvent, parse_event
from daemon.events import job_event, worker_event
from ops.fleet import Fleet
from ops.top_frame import Depths, document, frame, lines


def a_worker(name: str, worker_id: str = "box", **data: object) -> ReceivedEvent:
    event = worker_event(name, worker_id=worker_id, data={"worker_id": worker_id, **data})
    return parse_event(event.routing_key, event.body)


def a_job(name: str, job_id: str = "fox", **data: object) -> ReceivedEvent:
    event = job_event(name, job_id=job_id, worker_id="box", data={"worker_id": "box", **data})
    return parse_event(event.routing_key, event.body)


def heartbeat(**data: object) -> ReceivedEvent:
    rank = {"rank": 0, "state": "generating", "phase": "denoise", "step": 3, "steps": 8, "memory_used_bytes": 3 << 30}
    about = {"worker_id": "box", "pool": "wan", "state": "generating", "heartbeat_seconds": 2.0, "ranks": [rank]}
    told = {**about, "consumer": "consuming", "publisher": "connected", **data}
    event = worker_event("heartbeat", worker_id="box", data=told)
    return parse_event(event.routing_key, event.body)


def drawn(fleet: Fleet, depths: Depths, now: float) -> str:
    console = Console(file=io.StringIO(), width=130)
    console.print(frame(fleet, depths, now))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO above
    assert isinstance(text, str)
    return text


def test_a_worker_is_silent_after_three_of_its_own_heartbeats() -> None:
    fleet = Fleet()
    fleet.take(heartbeat(), now=100.0)
    worker = fleet.workers["box"]
    assert not worker.is_silent(106.0)
    assert worker.is_silent(106.1)
    assert "silent for 8 s" in drawn(fleet, {}, 108.0)
    fleet.take(heartbeat(), now=200.0)
    assert not worker.is_silent(201.0), "it came back"
    fleet.take(a_worker("stopped", exit_status=0), now=201.0)
    assert not worker.is_silent(500.0), "it said that it stopped"
    assert "stopped" in drawn(fleet, {}, 500.0)


def test_a_job_goes_from_the_running_to_the_ended() -> None:
    """The latest event counts, a second attempt forgets the steps of the first, and an answer to a cancel is no job."""
    fleet = Fleet()
    fleet.take(a_job("accepted", attempt=1), now=1.0)
    fleet.take(a_job("progress", attempt=1, phase="denoise", step=3, steps=8, seconds_per_step=0.5), now=2.0)
    assert "denoise 3/8, 0.5 s/step" in drawn(fleet, {}, 3.0)
    fleet.take(a_job("accepted", attempt=2), now=4.0)
    assert "step" not in fleet.going_on[0].data
    fleet.take(a_job("failed", attempt=2, code="internal", message="[bold]no"), now=5.0)
    fleet.take(a_job("cancel_noted", job_id="other", state="unknown"), now=5.0)
    assert (fleet.going_on, [job.job_id for job in fleet.ended]) == ([], ["fox"])
    assert "internal: [bold]no" in drawn(fleet, {}, 6.0)
    fleet.take(a_job("progress", job_id="lost"), now=7.0)
    fleet.take(a_job("progress", job_id="next"), now=7.0 + 3601)
    assert [job.job_id for job in fleet.going_on] == ["next"], "nobody heard how the other one ended"


def test_what_is_wrong_is_told() -> None:
    """A consumer that waits, a publisher that is blocked, dead letters, and a queue that is not there."""
    fleet = Fleet()
    fleet.take(heartbeat(consumer="waiting for the broker: x", publisher="blocked by the broker: memory"), now=1.0)
    text = drawn(fleet, {"wan": {"waiting": 2, "dead": 7}, "gone": {"waiting": None, "dead": None}}, 1.0)
    for words in ("consumer: waiting for the broker", "publisher: blocked by the broker", "7", "?"):
        assert words in text


def test_two_workers_of_one_name_are_told_from_one_that_was_started_again() -> None:
    first, second = ({"instance": name, "host": "box", "pid": pid} for name, pid in (("a", 7), ("b", 8)))
    fleet = Fleet()
    for now, sender in ((1.0, first), (3.0, first), (4.0, second), (6.0, second)):
        fleet.take(heartbeat(**sender), now=now)
    assert fleet.workers["box"].processes == ["box pid 8"], "it took the place of the other"
    fleet.take(heartbeat(**first), now=6.5)
    assert "2 workers have this worker_id: box pid 7, box pid 8" in drawn(fleet, {}, 6.5)
    fleet.take(heartbeat(**second), now=12.6)
    assert fleet.workers["box"].processes == ["box pid 8"], "three heartbeats of the other stayed away"


def test_json_and_plain_lines_say_the_same() -> None:
    fleet = Fleet()
    fleet.take(heartbeat(draining="control"), now=1.0)
    fleet.take(a_job("progress", phase="denoise", step=3, steps=8), now=1.0)
    found = json.loads(json.dumps(document(fleet, {"wan": {"waiting": 0, "dead": 0}}, 2.0)))
    assert (found["workers"][0]["worker_id"], found["jobs"][0]["step"]) == ("box", 3)
    plain = list(lines(fleet, {"wan": {"waiting": 0, "dead": 0}}, 2.0))
    assert plain == [
        "worker box draining pool=wan ranks 0:denoise 3/8",
        "job fox progress on box: denoise 3/8",
        "queue wan waiting=0 dead=0",
    ]


def test_foreign_and_broken_events_do_no_harm() -> None:
    """What an older or a newer worker sends, and what is no event at all, is shown as far as it goes."""
    fleet = Fleet()
    for event in (
        parse_event("worker.box.heartbeat", b"\xff"),
        parse_event("worker.box.heartbeat", b"[" * 100_000),
        parse_event("job.a.progress", b"[]"),
        a_worker("heartbeat", ranks="none", heartbeat_seconds="often", state=3),
        a_worker("heartbeat", "old", ranks=[3, {"rank": 0}], pool=None),
        a_job("progress", step="x", steps=0),
    ):
        fleet.take(event, now=1.0)
    assert "box" in drawn(fleet, {}, 1.0)
