"""Histories made up for the checker's own tests: correct ones, and ways to spoil them.

Each job's part of a history is what a correct daemon leaves behind for it, in the order of the wire. Parts of
different jobs may be interleaved in any way that keeps each part's own order.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.history import (
    Acked,
    CancelAsked,
    Confirmed,
    DeadLetter,
    Delivered,
    End,
    HandedBack,
    Heard,
    Left,
    ManifestFound,
    Published,
    Record,
    Run,
    VideoSeen,
)

JOBS = "reeld.jobs.test"
GOOD_LINE = json.dumps(
    dict.fromkeys(
        ("timestamp", "level", "event", "logger", "service", "version", "host", "pid", "rank", "local_rank",
         "world_size"), "x"
    )
)  # fmt: skip
LOGS = [("worker.log:1", GOOD_LINE)]
_tags = itertools.count(1)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Part:
    """The records of one job. `final` ones are taken when the run is over, and stand at the end."""

    wire: list[Record]
    final: list[Record]


def history(parts: Sequence[Part], order: Sequence[int] = ()) -> list[Record]:
    """One history of several parts. `order` picks the part that the next record comes from; then one after another."""
    queues = [list(part.wire) for part in parts]
    mixed: list[Record] = []
    for choice in order:
        if queues and (chosen := queues[choice % len(queues)]):
            mixed.append(chosen.pop(0))
    mixed += [record for rest in queues for record in rest]
    return ended([Run(), *mixed, *(record for part in parts for record in part.final)])


def ended(records: Sequence[Record]) -> list[Record]:
    """The same with a fitting End, so that a spoilt history is not found by its length."""
    kept = [record for record in records if not isinstance(record, End)]
    return [*kept, End(records=len(kept))]


def published(job_id: str | None, text: str = "", *, digest: str | None = "", copies: int = 1) -> list[Record]:
    body = sha(f"{job_id}{text}")
    digest = sha(f"digest {body}") if digest == "" else digest
    return [Published(job_id=job_id, body=body, message_id=job_id, digest=digest)] * copies


def delivered(message: Record, *, redelivered: bool = False) -> Delivered:
    assert isinstance(message, Published)
    return Delivered(
        connection=1, channel=1, delivery_tag=next(_tags), queue=JOBS, body=message.body,
        message_id=message.message_id, redelivered=redelivered,
    )  # fmt: skip


def acked(delivery: Delivered, manifest: str | None = None) -> Acked:
    return Acked(connection=1, channel=1, delivery_tag=delivery.delivery_tag, manifest=manifest)


def told(job_id: str, name: str, data: dict[str, Any], number: str = "") -> list[Record]:
    event = {"id": f"{job_id}:{name}{number}", "data": {"job_id": job_id, "attempt": 1, "worker_id": "w", **data}}
    return [
        Heard(job_id=job_id, name=name, event=event),
        Confirmed(exchange="reeld.status", routing_key=f"job.{job_id}.{name}", body=sha(f"{event}")),
    ]


def result_of(job_id: str) -> dict[str, Any]:
    return {"video": {"path": f"/out/{job_id}/video.mp4", "sha256": sha(f"video {job_id}")}}


def succeeded(job_id: str, *, copies: int = 1) -> Part:
    """Generated once; every further copy is answered from the manifest."""
    messages = published(job_id, copies=copies)
    manifest = sha(f"manifest {job_id}")
    wire: list[Record] = [*messages]
    for number in range(copies):
        delivery = delivered(messages[0])
        wire += [delivery, *told(job_id, "succeeded", {"result": result_of(job_id)}), acked(delivery, manifest)]
        wire += [VideoSeen(path=f"/out/{job_id}/video.mp4", sha256=sha(f"video {job_id}"))] if number == 0 else []
    return Part(wire, _on_disk(job_id, messages[0]))


def redelivered(job_id: str) -> Part:
    """The connection was lost between the confirm and the ack: told twice, acked once."""
    message = published(job_id)
    first, second = delivered(message[0]), delivered(message[0], redelivered=True)
    said = told(job_id, "succeeded", {"result": result_of(job_id)})
    ack = acked(second, sha(f"manifest {job_id}"))
    return Part([*message, first, *said, second, *said, ack], _on_disk(job_id, message[0]))


def handed_back(job_id: str) -> Part:
    """A drain gave it back, and somebody else did it."""
    message = published(job_id)
    first, second = delivered(message[0]), delivered(message[0], redelivered=True)
    back = HandedBack(connection=1, channel=1, delivery_tag=first.delivery_tag)
    said = told(job_id, "succeeded", {"result": result_of(job_id)})
    ack = acked(second, sha(f"manifest {job_id}"))
    return Part([*message, first, back, second, *said, ack], _on_disk(job_id, message[0]))


def retried(job_id: str) -> Part:
    """Once over the ladder, then done."""
    message = published(job_id)
    assert isinstance(message[0], Published)
    first, second = delivered(message[0]), delivered(message[0])
    copy = Confirmed(exchange="", routing_key=f"{JOBS}.retry.10s", body=message[0].body, message_id=job_id)
    said = told(job_id, "succeeded", {"result": result_of(job_id)})
    ack = acked(second, sha(f"manifest {job_id}"))
    return Part([*message, first, copy, acked(first), second, *said, ack], _on_disk(job_id, message[0]))


def failed(job_id: str | None, code: str = "malformed_job") -> Part:
    """Dead-lettered, and told where there is an id to tell it under."""
    message = published(job_id, "bad" if job_id else "no id", digest=None)
    assert isinstance(message[0], Published)
    delivery = delivered(message[0])
    copy = Confirmed(exchange="reeld.dead", routing_key="test", body=message[0].body, message_id=job_id)
    said = told(job_id, "failed", {"code": code}) if job_id else []
    letter = DeadLetter(body=message[0].body, message_id=job_id, code=code)
    return Part([*message, delivery, copy, *said, acked(delivery)], [letter])


def conflicting(job_id: str) -> Part:
    """Two requests under one id: the first is done, the second refused."""
    first, second = succeeded(job_id), failed(job_id, "job_id_conflict")
    return Part(first.wire + second.wire, first.final + second.final)


def cancelled(job_id: str) -> Part:
    message = published(job_id)
    delivery = delivered(message[0])
    said = told(job_id, "cancelled", {})
    return Part([*message, CancelAsked(job_id=job_id), delivery, *said, acked(delivery)], [])


def sent_twice(job_id: str) -> Part:
    """The publisher saw no confirm, and published again; only the second arrived."""
    part = succeeded(job_id)
    assert isinstance(part.wire[0], Published)
    return Part([replace(part.wire[0], confirmed=False), *part.wire], part.final)


def _on_disk(job_id: str, message: Record) -> list[Record]:
    assert isinstance(message, Published)
    assert message.digest is not None
    return [
        ManifestFound(
            job_id=job_id, sha256=sha(f"manifest {job_id}"), digest=message.digest, result=result_of(job_id)
        ),
        VideoSeen(path=f"/out/{job_id}/video.mp4", sha256=sha(f"video {job_id}")),
    ]  # fmt: skip


KINDS: list[Callable[[str], Part]] = [
    succeeded,
    lambda job_id: succeeded(job_id, copies=3),
    redelivered,
    handed_back,
    retried,
    failed,
    lambda _job_id: failed(None),
    conflicting,
    cancelled,
    sent_twice,
]


def parts_of(kinds: Sequence[int]) -> list[Part]:
    """A part for each number of a kind. Messages without an id would be one message: at most one of them."""
    seen_without_id = False
    parts = []
    for number, kind in enumerate(kinds):
        if kind == 6 and seen_without_id:
            continue
        seen_without_id |= kind == 6
        parts.append(KINDS[kind](f"job-{number}"))
    return parts


@dataclass(frozen=True)
class Spoil:
    """A way to spoil a history at one record, and the rule that it breaks. `fits` picks the records to do it at."""

    name: str
    rule: str
    fits: Callable[[Record, list[Record]], bool]
    apply: Callable[[Record, list[Record], int], list[Record]]


def _drop(_record: Record, records: list[Record], at: int) -> list[Record]:
    return records[:at] + records[at + 1 :]


def _add(*extra: Record) -> Callable[[Record, list[Record], int], list[Record]]:
    return lambda _record, records, at: [*records[: at + 1], *extra, *records[at + 1 :]]


def _change(**fields: Any) -> Callable[[Record, list[Record], int], list[Record]]:
    return lambda record, records, at: [*records[:at], replace(record, **fields), *records[at + 1 :]]


def _only(record: Record, records: list[Record]) -> bool:
    return records.count(record) == 1


def _heard(record: Record, name: str) -> bool:
    return isinstance(record, Heard) and record.name == name


def _event_again(**changes: Any) -> Callable[[Record, list[Record], int], list[Record]]:
    def apply(record: Record, records: list[Record], at: int) -> list[Record]:
        assert isinstance(record, Heard)
        event = {**record.event, **{key: value for key, value in changes.items() if key != "data"}}
        event["data"] = {**record.data, **changes.get("data", {})}
        again = replace(record, event=event, name=changes.get("name", record.name))
        return [*records[: at + 1], again, *records[at + 1 :]]

    return apply


def _ack_first(record: Record, records: list[Record], at: int) -> list[Record]:
    """Moves an ack to right behind its delivery."""
    assert isinstance(record, Acked)
    begin = next(
        number
        for number, each in enumerate(records)
        if isinstance(each, Delivered) and each.delivery_tag == record.delivery_tag
    )
    without = _drop(record, records, at)
    return [*without[: begin + 1], record, *without[begin + 1 :]]


def _first_outcome(record: Record, records: list[Record]) -> bool:
    """An ack of the delivery with which its job ended for the first time: nothing was durable before."""
    if not isinstance(record, Acked):
        return False
    deliveries = {each.delivery_tag: each for each in records if isinstance(each, Delivered)}
    body = deliveries[record.delivery_tag].body
    mine = [each for each in records if isinstance(each, Delivered) and each.body == body]
    return len(mine) == 1


SPOILS = [
    Spoil("the manifest is gone", "event_without_manifest", lambda r, _: isinstance(r, ManifestFound), _drop),
    Spoil(
        "a cancelled job is not told", "lost", lambda r, _: _heard(r, "cancelled"), _drop
    ),
    Spoil(
        "a dead letter is gone", "event_without_dead_letter",
        lambda r, _: isinstance(r, DeadLetter) and r.message_id is not None, _drop,
    ),
    Spoil("a dead letter without id is gone", "lost", lambda r, _: isinstance(r, DeadLetter) and not r.message_id,
          _drop),
    Spoil(
        "success is not told", "manifest_without_event", lambda r, all_: _heard(r, "succeeded") and _only(r, all_),
        _drop,
    ),
    Spoil("failure is not told", "dead_letter_without_event", lambda r, _: _heard(r, "failed"), _drop),
    Spoil("another success is told", "two_terminal_events", lambda r, _: _heard(r, "succeeded"),
          _event_again(id="another")),
    Spoil("a failure is told as well", "event_without_dead_letter", lambda r, _: _heard(r, "succeeded"),
          _event_again(id="x", name="failed", data={"code": "internal"})),
    Spoil("a cancel is told as well", "two_endings",
          lambda r, all_: _heard(r, "succeeded") and _single(r, all_),
          _event_again(id="x", name="cancelled")),
    Spoil("the repeat says something else", "repeat_differs", lambda r, _: _heard(r, "succeeded"),
          _event_again(data={"result": {"video": "another"}})),
    Spoil("the repeated failure has another code", "repeat_differs", lambda r, _: _heard(r, "failed"),
          _event_again(data={"code": "internal"})),
    Spoil("the event is not what the manifest says", "event_differs_from_manifest",
          lambda r, _: isinstance(r, ManifestFound), _change(result=result_of("other"))),
    Spoil("the manifest is for another request", "wrong_request", lambda r, _: isinstance(r, ManifestFound),
          _change(digest=sha("other"))),
    Spoil("the manifest was replaced", "manifest_rewritten", lambda r, _: isinstance(r, ManifestFound),
          _change(sha256=sha("other"))),
    Spoil("the ack comes first", "ack_before_outcome", _first_outcome, _ack_first),
    Spoil("the ack comes before the manifest", "ack_before_outcome",
          lambda r, _: isinstance(r, Acked) and r.manifest is not None, _change(manifest=None)),
    Spoil("the confirm never came", "ack_before_outcome",
          lambda r, all_: isinstance(r, Confirmed) and _only(r, all_), _drop),
    Spoil("no ack was seen", "never_acked", _first_outcome, _drop),
    Spoil("the video changed meanwhile", "video_rewritten", lambda r, _: isinstance(r, ManifestFound),
          lambda r, all_, at: _add(VideoSeen(path=_path(r), sha256=sha("other")))(r, all_, at)),
    Spoil("the video is gone", "video_missing", lambda r, _: isinstance(r, ManifestFound),
          lambda r, all_, _: [*all_, VideoSeen(path=_path(r), sha256=None)]),
    Spoil("the dead letter says no reason", "dead_letter_without_code", lambda r, _: isinstance(r, DeadLetter),
          _change(code=None)),
    Spoil("something is left", "left_in_queue", lambda r, _: isinstance(r, Published),
          lambda r, all_, at: _add(Left(queue=JOBS, body=_body(r)))(r, all_, at)),
    Spoil("a foreign event", "unknown_job", lambda r, _: isinstance(r, Published),
          _add(Heard(job_id="stranger", name="failed", event={"id": "s", "data": {"code": "internal"}}))),
    Spoil("a foreign dead letter", "unknown_job", lambda r, _: isinstance(r, Published),
          _add(DeadLetter(body=sha("stranger"), code="internal"))),
    Spoil("a job that nobody answered", "lost", lambda r, _: isinstance(r, Run),
          _add(*published("forgotten"))),
    Spoil("it was never published", "unknown_job",
          lambda r, all_: isinstance(r, Published) and _single_copy(r, all_), _drop),
    Spoil("nobody asked for the cancel", "cancelled_unasked", lambda r, _: isinstance(r, CancelAsked), _drop),
]  # fmt: skip


def _single(record: Record, records: list[Record]) -> bool:
    """The job of this event was published once only."""
    assert isinstance(record, Heard)
    return sum(isinstance(each, Published) and each.job_id == record.job_id for each in records) == 1


def _single_copy(record: Record, records: list[Record]) -> bool:
    """No other attempt to publish the same message was made."""
    return sum(isinstance(each, Published) and each.body == _body(record) for each in records) == 1


def _path(record: Record) -> str:
    assert isinstance(record, ManifestFound)
    return str(record.result["video"]["path"])


def _body(record: Record) -> str:
    assert isinstance(record, Published)
    return record.body
