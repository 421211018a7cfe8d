"""The tap on the wire: what a client did is what the history says, frame by frame, from a real broker."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import pytest

from ops.private_broker import PrivateBroker
from tests.history import Acked, Confirmed, Delivered, HandedBack, Record, Recorder, Run, read_history, sha256_of
from tests.proxy import Proxy
from tests.wire import Tap


class Tapped:
    def __init__(self, recorder: Recorder, tap: Tap, channel: Any) -> None:
        self._recorder, self._tap, self.channel = recorder, tap, channel

    def records(self) -> list[Record]:
        """All but the Run, once the broker has answered a last question: everything before it has passed."""
        self.channel.queue_declare("jobs", passive=True)
        self._recorder.close()
        assert self._tap.fault is None
        return [record for _, record in read_history(self._recorder.folder)][1:-1]

    def send(self, body: bytes, message_id: str, **properties: Any) -> None:
        self.channel.basic_publish(
            "", "jobs", body, pika.BasicProperties(message_id=message_id, **properties), mandatory=True
        )

    def take(self, count: int) -> list[int]:
        tags = []
        for method, _, _ in self.channel.consume("jobs", inactivity_timeout=20):
            assert method is not None
            tags.append(method.delivery_tag)
            if len(tags) == count:
                return tags
        raise AssertionError


@pytest.fixture
def tapped(broker: PrivateBroker, vhost: str, tmp_path: Path) -> Iterator[Tapped]:
    recorder = Recorder(tmp_path, Run())
    tap = Tap(recorder, tmp_path / "output")
    with Proxy(broker.amqp_port, observe=tap.see) as proxy:
        connection = pika.BlockingConnection(pika.URLParameters(proxy.through(vhost)))
        channel = connection.channel()
        channel.queue_declare("jobs")
        channel.confirm_delivery()
        yield Tapped(recorder, tap, channel)
        connection.close()


def test_a_delivery_is_followed_to_its_ack(tapped: Tapped, tmp_path: Path) -> None:
    """Confirm, delivery and ack are recorded in order, with the manifest that was there when the ack went by."""
    tapped.send(b'{"job_id": "one"}', "other")
    tapped.send(b"no json" * 30_000, "two", headers={"a": 1}, correlation_id="c", content_type="x", priority=3)
    one, two = tapped.take(2)
    (tmp_path / "output" / "one").mkdir(parents=True)
    (tmp_path / "output" / "one" / "manifest.json").write_bytes(b"{}")
    tapped.channel.basic_ack(one)
    tapped.channel.basic_ack(two)
    records = tapped.records()
    bodies = [sha256_of(b'{"job_id": "one"}'), sha256_of(b"no json" * 30_000)]
    assert [each for each in records if isinstance(each, Confirmed)] == [
        Confirmed(exchange="", routing_key="jobs", body=bodies[0], message_id="other"),
        Confirmed(exchange="", routing_key="jobs", body=bodies[1], message_id="two"),
    ]
    delivered = [each for each in records if isinstance(each, Delivered)]
    assert [(each.queue, each.body, each.message_id) for each in delivered] == [
        ("jobs", bodies[0], "other"),
        ("jobs", bodies[1], "two"),
    ]
    acks = [each for each in records if isinstance(each, Acked)]
    assert [(each.delivery_tag, each.manifest) for each in acks] == [(one, sha256_of(b"{}")), (two, None)]
    assert records.index(acks[0]) > records.index(delivered[0])


def test_one_ack_for_several_counts_for_each(tapped: Tapped) -> None:
    """`multiple` acks all deliveries up to the tag; a nack is no ack."""
    for number in range(4):
        tapped.send(b"", f"m{number}")
    tags = tapped.take(4)
    tapped.channel.basic_nack(tags[0], requeue=False)
    tapped.channel.basic_ack(tags[2], multiple=True)
    records = tapped.records()
    assert [each.delivery_tag for each in records if isinstance(each, HandedBack)] == [tags[0]]
    assert [each.delivery_tag for each in records if isinstance(each, Acked)] == tags[1:3]


def test_what_was_returned_was_not_confirmed(tapped: Tapped) -> None:
    """The broker confirms an unroutable message after it has returned it: it is in no queue, and not recorded."""
    with pytest.raises(pika.exceptions.UnroutableError):
        tapped.channel.basic_publish("", "nowhere", b"x", pika.BasicProperties(message_id="lost"), mandatory=True)
    tapped.send(b"x", "kept")
    assert [each.message_id for each in tapped.records() if isinstance(each, Confirmed)] == ["kept"]
