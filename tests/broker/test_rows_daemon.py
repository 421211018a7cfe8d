"""Rows 4 to 7, 20, 21, 23, 24 and 28 of the fault matrix: one daemon, the network to its broker, and its messages.

That bad messages reach no rank but 0 is shown in `tests/distributed/test_path.py`; the limits of inputs one by one in
`tests/unit`.
"""

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import pytest
from PIL import Image

from daemon import client
from daemon.sections import BrokerConfig
from ops.private_broker import PrivateBroker
from tests.broker.daemon_under_fault import (
    AUDIT,
    HEARTBEAT_SECONDS,
    TOPOLOGY,
    DaemonUnderFault,
    daemon_under_fault,
    prepare_broker,
)
from tests.harness import fresh_vhost, job, take
from tests.node import api
from tests.pictures import png_header
from tests.proxy import TO_BROKER, TO_CLIENT


@pytest.fixture(scope="module")
def running(
    broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonUnderFault]:
    folder = tmp_path_factory.mktemp("network")
    with fresh_vhost(broker) as url:
        prepare_broker(url)
        with daemon_under_fault(url, broker.amqp_port, folder, models) as running:
            yield running


@pytest.fixture
def daemon(running: DaemonUnderFault) -> Iterator[DaemonUnderFault]:
    """The module's daemon, with a sound network before and after."""
    yield running
    running.proxy.heal()


def test_row_04_connection_reset_in_mid_job(daemon: DaemonUnderFault) -> None:
    """A reset in mid-job does not stop the job; its stale ack is not sent, and the redelivery finds the manifest."""
    job_id = daemon.publish_long()
    assert daemon.proxy.reset("consumer") == 1
    daemon.worker.wait_log("job_succeeded", job_id=job_id)
    daemon.worker.wait_log("stale_delivery", job_id=job_id, wanted="acked")
    daemon.worker.wait_log("job_already_done", job_id=job_id)
    daemon.check_done_once(job_id)


def test_row_04_resets_in_one_job_do_not_exhaust_its_deliveries(daemon: DaemonUnderFault) -> None:
    """More resets in one job than the delivery limit allows: it is not consumed again before it is settled."""
    job_id = daemon.publish_long()
    for _ in range(5):
        lines = len(daemon.worker.lines())
        opened = daemon.proxy.hold("Basic.Qos", TO_BROKER)  # of the next connection, whose login is through then
        daemon.proxy.reset("consumer")
        daemon.worker.wait_log("connection_lost", after=lines, logger="consumer")
        opened.wait()
    daemon.proxy.release(opened)
    assert all(line["job_id"] != job_id for line in daemon.events("job_succeeded")), "too short a job for this test"
    daemon.worker.wait_log("job_already_done", job_id=job_id)
    daemon.check_done_once(job_id)


def test_row_05_black_hole_is_noticed(daemon: DaemonUnderFault) -> None:
    """When packets vanish, the daemon drops the connection within heartbeat + 5 s, and the job is done once."""
    job_id = daemon.publish_long()
    lines = len(daemon.worker.lines())
    vanished = time.time()
    daemon.proxy.black_hole()
    lost = daemon.worker.wait_log("connection_lost", after=lines, logger="consumer")
    noticed = datetime.fromisoformat(lost["timestamp"]).timestamp()
    assert noticed - vanished <= HEARTBEAT_SECONDS + 8  # seven ticks of a second, each late under load
    assert "AMQPHeartbeatTimeout" in lost["reason"]
    daemon.worker.wait_log("broker_unavailable", after=lines, logger="consumer")
    daemon.proxy.heal()
    daemon.worker.wait_log("job_already_done", job_id=job_id)
    daemon.check_done_once(job_id)


def test_row_06_reset_between_confirm_and_ack(daemon: DaemonUnderFault) -> None:
    """A result that is confirmed but not acked is redelivered: the same result is published again, then acked."""
    held = daemon.proxy.hold("Basic.Ack", TO_BROKER)
    job_id = daemon.publish(job())
    held.wait()
    assert [name for name, _ in daemon.ends(job_id)] == ["succeeded"]
    daemon.proxy.reset("consumer")
    daemon.worker.wait_log("job_already_done", job_id=job_id, redelivered=True)
    daemon.check_done_once(job_id)
    assert len(daemon.ends(job_id)) == 2, "the redelivery said it again"


def test_row_06_publisher_reset_just_after_the_confirm(daemon: DaemonUnderFault) -> None:
    """A publisher's connection that is lost when the confirm is there costs nothing: no second event, no process."""
    published = daemon.proxy.hold("Basic.Publish", TO_BROKER, matches=lambda frame: b".succeeded" in frame.raw)
    job_id = daemon.publish(job())
    published.wait()
    lines = len(daemon.worker.lines())
    counted = daemon.proxy.hold("Channel.Close", TO_BROKER)  # of the look at the alternate exchange's queue
    daemon.proxy.release(published)
    counted.wait()
    daemon.proxy.reset("publisher")
    daemon.worker.wait_log("connection_lost", after=lines, logger="publisher")
    daemon.worker.wait_log("job_succeeded", job_id=job_id)
    daemon.check_done_once(job_id)
    assert len(daemon.ends(job_id)) == 1
    assert not daemon.events("uncaught_exception_in_thread")


def test_row_07_publisher_confirm_that_never_comes(daemon: DaemonUnderFault) -> None:
    """A confirm that never comes meets its deadline; the result is published again on a new connection, then acked."""
    published = daemon.proxy.hold("Basic.Publish", TO_BROKER, matches=lambda frame: b".succeeded" in frame.raw)
    job_id = daemon.publish(job())
    published.wait()
    confirm = daemon.proxy.lose("Basic.Ack", TO_CLIENT)
    daemon.proxy.release(published)
    confirm.wait()
    lines = len(daemon.worker.lines())
    lost = daemon.worker.wait_log("connection_lost", after=lines, logger="publisher")
    assert "OverdueError" in lost["reason"]
    daemon.worker.wait_log("job_succeeded", job_id=job_id)
    daemon.check_done_once(job_id)
    assert len(daemon.ends(job_id)) == 2, "the first one had arrived"
    assert not [line for line in daemon.events("job_already_done") if line["job_id"] == job_id], "no redelivery"


def _body(**fields: Any) -> bytes:
    return json.dumps(job(job_id="ID", **fields)).encode()


_BAD_MESSAGES: dict[str, tuple[bytes, str]] = {
    "bad JSON": (b'{"schema": "reeld.job/1", "job_id": "ID", ', "(body)"),
    "bad UTF-8": (b'{"schema": "reeld.job/1", "job_id": "ID", "prompt": "\xff"}', "(body)"),
    "wrong type": (_body(parameters={"num_frames": "many"}), "parameters.num_frames"),
    "unknown version": (_body(schema="reeld.job/9"), "schema"),
    "unknown field": (_body(surprise=1), "surprise"),
}


@pytest.mark.parametrize("fault", _BAD_MESSAGES)
def test_row_20_bad_message_is_dead_lettered(daemon: DaemonUnderFault, fault: str) -> None:
    """What is no valid job is dead-lettered with a code and the field's path, told to its publisher, never begun."""
    body, path = _BAD_MESSAGES[fault]
    daemon.check_refused(body, code="malformed_job", path=path)


def test_row_21_oversized_body_is_not_parsed(daemon: DaemonUnderFault) -> None:
    """A body over limits.max_body_bytes is dead-lettered by its size."""
    daemon.check_refused(_body(metadata={"padding": "x" * (1 << 20)}), code="malformed_job", path="(body)")


def test_row_21_oversized_prompt_and_image_bomb(daemon: DaemonUnderFault) -> None:
    """A prompt over its limit, and a picture of 3.6 gigapixels in a file of some bytes, are refused by their field."""
    daemon.check_refused(_body(prompt="fox " * 1001), code="malformed_job", path="prompt")
    bomb = daemon.folder / "bomb.png"
    bomb.write_bytes(png_header(60_000, 60_000))
    body = _body(task="image_to_video", inputs={"input_image": bomb.as_uri()})
    daemon.check_refused(body, code="input_rejected", path="inputs.input_image")


def test_row_23_unroutable_terminal_event_is_kept(daemon: DaemonUnderFault) -> None:
    """A terminal event that nobody listens to is kept by the alternate exchange, and the log warns of it; heartbeats
    and progress are not kept."""
    take(daemon.url, TOPOLOGY.unrouted)
    connection = pika.BlockingConnection(pika.URLParameters(daemon.url))
    channel = connection.channel()
    channel.queue_unbind(AUDIT, TOPOLOGY.status_exchange, "job.#")
    try:
        job_id = daemon.publish(job(job_id=f"fox.{uuid.uuid4()}"))
        daemon.worker.wait_log("event_unrouted", kept_in=TOPOLOGY.unrouted, routing_key=f"job.{job_id}.succeeded")
        daemon.worker.wait_log("job_succeeded", job_id=job_id)
    finally:
        channel.queue_bind(AUDIT, TOPOLOGY.status_exchange, "job.#")
        connection.close()
    kept = [json.loads(body) for _, body in take(daemon.url, TOPOLOGY.unrouted)]
    assert [(event["subject"], event["type"]) for event in kept] == [(job_id, "reeld.job.succeeded")]
    lines = len(daemon.worker.lines())
    for _ in range(2):  # of the first all is said once the second is done: there is one publisher
        daemon.check_serves()
    assert not daemon.events("event_unrouted", after=lines), "somebody listens again"


def test_row_24_missing_retry_queue_holds_the_job(daemon: DaemonUnderFault) -> None:
    """Without the ladder's queue the original is not acked; the copy is published once the queue is there again."""
    image = daemon.folder / "late.png"
    connection = pika.BlockingConnection(pika.URLParameters(daemon.url))
    connection.channel().queue_delete(TOPOLOGY.retry_queue(1))
    connection.close()
    acked = daemon.proxy.hold("Basic.Ack", TO_BROKER)
    job_id = daemon.publish(job(task="image_to_video", inputs={"input_image": image.as_uri()}))
    _wait_for_failures(daemon, TOPOLOGY.retry_queue(1), "to no queue")
    assert not acked.caught.is_set()
    assert client.apply_on(BrokerConfig(url=daemon.url), TOPOLOGY) == []
    acked.wait()
    daemon.proxy.release(acked)
    Image.new("RGB", (96, 64), "teal").save(image)
    daemon.worker.wait_log("job_succeeded", job_id=job_id)
    assert [name for name, _ in daemon.ends(job_id)] == ["succeeded"]


def _fill(channel: Any, queue: str) -> None:
    for _ in range(20):  # a policy takes a moment
        channel.basic_publish("", queue, b"others fill it")


def test_row_24_full_retry_queue_holds_the_job(daemon: DaemonUnderFault, broker: PrivateBroker) -> None:
    """While the ladder's queue is full the original is not acked; once there is room the copy goes there, with the
    publisher's priority, and its expiration as a header."""
    queue, vhost = TOPOLOGY.retry_queue(600), daemon.url.rpartition("/")[2]
    api(broker, "PUT", f"/policies/{vhost}/full", {"pattern": "600s$", "definition": {"max-length": 1}})
    connection = pika.BlockingConnection(pika.URLParameters(daemon.url))
    channel = connection.channel()
    channel.confirm_delivery()
    with pytest.raises(pika.exceptions.NackError):
        _fill(channel, queue)
    connection.close()
    acked = daemon.proxy.hold("Basic.Ack", TO_BROKER)
    message = job(task="image_to_video", inputs={"input_image": (daemon.folder / "never.png").as_uri()})
    daemon.publish(message, headers={"x-reeld-attempt": 3}, priority=4, expiration="3600000")
    _wait_for_failures(daemon, queue, "full or unavailable")
    assert not acked.caught.is_set()
    # By taking them out, not by a larger limit: a quorum queue tells publishers that there is room when a message goes.
    take(daemon.url, queue)
    acked.wait()
    daemon.proxy.release(acked)
    api(broker, "DELETE", f"/policies/{vhost}/full")
    ((properties, body),) = take(daemon.url, queue)
    assert json.loads(body)["job_id"] == message["job_id"]
    assert properties.headers["x-reeld-attempt"] == 4
    assert properties.priority == 4
    assert properties.expiration is None, "it would end the copy's stay on the ladder"
    assert 0 < properties.headers["x-reeld-expires-at"] / 1000 - time.time() <= 3600
    assert daemon.ends(message["job_id"]) == []


def test_expired_job_is_not_begun(daemon: DaemonUnderFault) -> None:
    """A job whose expiration has passed when it comes, from the ladder or by its timestamp, fails as `expired`."""
    for properties in (
        {"headers": {"x-reeld-expires-at": round(time.time() * 1000) - 1}},
        {"expiration": "60000", "timestamp": round(time.time()) - 61},
    ):
        message = job()
        daemon.publish(message, **properties)
        daemon.worker.wait_log("job_failed", job_id=message["job_id"], code="expired")
        daemon.check_serves()
        assert [name for name, _ in daemon.ends(message["job_id"])] == ["failed"]
        assert daemon.started(message["job_id"]) == 0
        (letter,) = take(daemon.url, TOPOLOGY.dead_queue)
        assert letter[0].headers["x-reeld-code"] == "expired"
        assert "x-reeld-expires-at" not in letter[0].headers, "put back by hand it may run"


def test_row_28_starved_connection_reconnects(daemon: DaemonUnderFault) -> None:
    """Rank 0 does not run for longer than the heartbeat; the broker hangs up, and nothing runs twice."""
    job_id = daemon.publish_long()
    pid = daemon.rank0()
    lines = len(daemon.worker.lines())
    os.kill(pid, signal.SIGSTOP)
    try:
        while any("consumer" in name for name in daemon.proxy.names()):
            time.sleep(0.2)  # the broker's patience; it offers no event
    finally:
        os.kill(pid, signal.SIGCONT)
    daemon.worker.wait_log("connection_lost", after=lines, logger="consumer")
    daemon.worker.wait_log("job_succeeded", job_id=job_id)
    daemon.check_done_once(job_id)


def _wait_for_failures(daemon: DaemonUnderFault, queue: str, reason: str) -> None:
    """Until publishing to a queue failed twice."""
    lines = 0
    for _ in range(2):
        failed = daemon.worker.wait_log("publish_failed", after=lines, routing_key=queue)
        assert reason in failed["reason"]
        lines = [json.loads(line)["timestamp"] for line in daemon.worker.lines()].index(failed["timestamp"]) + 1
