"""The publisher's and the watcher's side against a real broker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from daemon import client
from daemon.broker_probe import broker_facts
from daemon.dead_letters import take_dead_letter
from daemon.errors import (
    BrokerUnavailableError,
    ConfigError,
    CredentialsError,
    PublishError,
    UnroutablePublishError,
)
from daemon.events import Event, job_event, worker_event
from daemon.sections import BrokerConfig
from daemon.topology import Topology
from ops.private_broker import PrivateBroker
from tests.brokers import enter_root
from tests.node import api

POOL = "tiny"
TOPOLOGY = Topology(prefix="reeld", pool=POOL, delivery_limit=3, retry_delays_seconds=(10,))


@pytest.fixture
def settings(vhost: str) -> BrokerConfig:
    """A virtual host with the topology applied."""
    settings = BrokerConfig(url=vhost)
    assert client.apply_on(settings, TOPOLOGY) == []
    return settings


@contextmanager
def channel_on(url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        yield connection.channel()
    finally:
        if connection.is_open:
            connection.close()


def take(channel: BlockingChannel, queue: str) -> tuple[Any, bytes]:
    """The first message of a queue, acked; waits for it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        method, properties, body = channel.basic_get(queue, auto_ack=True)
        if method is not None:
            return properties, body
        time.sleep(0.02)
    raise AssertionError(f"{queue} stayed empty")


def send(url: str, event: Event) -> None:
    with channel_on(url) as channel:
        channel.confirm_delivery()
        channel.basic_publish(TOPOLOGY.status_exchange, event.routing_key, event.body)


@contextmanager
def reeld(*arguments: str, url: str) -> Iterator[subprocess.Popen[str]]:
    """The real command, with the broker's URL in the environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REELD_")}
    with subprocess.Popen(
        [sys.executable, "-m", "ops.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "REELD_AMQP_URL": url, "NO_COLOR": "1"},
        # A test run in a shell's background has SIGINT ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().rstrip("\n")


def test_a_published_job_is_persistent_json_with_its_id(settings: BrokerConfig) -> None:
    """What reaches the queue has everything a worker and a restarted broker need."""
    client.publish_job(settings, pool=POOL, body=b'{"a": 1}', message_id="job-1")
    with channel_on(settings.url) as channel:
        properties, body = take(channel, TOPOLOGY.jobs_queue)
    assert body == b'{"a": 1}'
    assert (properties.delivery_mode, properties.message_id) == (2, "job-1")
    assert properties.content_type == "application/json"


def test_a_job_for_an_unknown_pool_is_unroutable(settings: BrokerConfig) -> None:
    """The error names the pool and what to do."""
    with pytest.raises(UnroutablePublishError, match=r"'nobody'.*reeld topology apply"):
        client.publish_job(settings, pool="nobody", body=b"{}", message_id="job-1")


def test_a_job_without_any_topology_is_unroutable(vhost: str) -> None:
    """A missing exchange is the same mistake for the publisher as a missing queue."""
    with pytest.raises(UnroutablePublishError, match="reeld topology apply"):
        client.publish_job(BrokerConfig(url=vhost), pool=POOL, body=b"{}", message_id="job-1")


def test_a_full_queue_refuses_the_job(vhost: str) -> None:
    """A bounded queue says no to the publisher, who can try later; nothing is dropped in silence."""
    settings = BrokerConfig(url=vhost)
    full = Topology(prefix="reeld", pool=POOL, delivery_limit=3, retry_delays_seconds=(), max_length=1)
    assert client.apply_on(settings, full) == []

    def fill() -> None:
        for number in range(20):  # the limit is enforced a few messages late
            client.publish_job(settings, pool=POOL, body=b"{}", message_id=f"job-{number}")
            time.sleep(0.05)

    with pytest.raises(PublishError, match="queue full"):
        fill()


def test_a_broker_under_alarm_does_not_hold_the_publisher_for_ever(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A memory alarm stops confirms; the publisher gives up in the configured time and says so."""
    with PrivateBroker(tmp_path_factory.mktemp("alarmed"), plugins=(), enter=enter_root()) as broker:
        settings = BrokerConfig(url=broker.amqp_url, connect_timeout_seconds=1, confirm_timeout_seconds=1)
        assert client.apply_on(settings, TOPOLOGY) == []
        broker.ctl("set_vm_memory_high_watermark", "0.00000001")
        with pytest.raises(PublishError, match="did not confirm"):
            client.publish_job(settings, pool=POOL, body=b"{}", message_id="job-1")


def test_events_published_after_the_constructor_are_not_missed(settings: BrokerConfig) -> None:
    """The queue is bound once the stream exists, and only the bound keys come."""
    with client.EventStream(settings, ["job.a.#"]) as stream:
        send(settings.url, job_event("started", job_id="b", worker_id="w", data={}))
        send(settings.url, job_event("progress", job_id="a", worker_id="w", data={"step": 1}))
        event = stream.next(10)
        assert event is not None
        assert (event.routing_key, event.name, event.data["step"]) == ("job.a.progress", "progress", 1)
        assert stream.next(0.2) is None


def test_an_event_stream_without_the_exchange_names_it(vhost: str) -> None:
    with pytest.raises(ConfigError, match=r"exchange reeld\.status does not exist.*reeld topology apply"):
        client.EventStream(BrokerConfig(url=vhost), ["#"])


def test_a_lost_connection_ends_the_event_stream(tmp_path_factory: pytest.TempPathFactory) -> None:
    """When the broker dies the stream says so; it does not wait in silence."""
    with PrivateBroker(tmp_path_factory.mktemp("dying"), plugins=(), enter=enter_root()) as broker:
        settings = BrokerConfig(url=broker.amqp_url)
        assert client.apply_on(settings, TOPOLOGY) == []
        with client.EventStream(settings, ["#"]) as stream:
            broker.kill()
            with pytest.raises(BrokerUnavailableError):
                stream.next(20)


def test_a_dead_letter_is_taken_once(settings: BrokerConfig) -> None:
    with channel_on(settings.url) as channel:
        channel.confirm_delivery()
        properties = pika.BasicProperties(headers={"x-reeld-code": "malformed_job"}, message_id="job-1")
        channel.basic_publish(TOPOLOGY.dead_exchange, POOL, b"body", properties, mandatory=True)
        deadline = time.monotonic() + 10
        letter = None
        while letter is None and time.monotonic() < deadline:
            letter = take_dead_letter(settings, POOL)
    assert letter is not None
    assert (letter.body, letter.message_id, letter.headers["x-reeld-code"]) == (
        b"body",
        "job-1",
        "malformed_job",
    )
    assert take_dead_letter(settings, POOL) is None


def test_the_broker_says_what_it_is(settings: BrokerConfig) -> None:
    facts = broker_facts(settings)
    assert facts.product == "RabbitMQ"
    assert facts.version[0].isdigit()
    assert "guest:" not in facts.address


def test_refused_credentials_are_told_apart(vhost: str) -> None:
    url = vhost.replace("guest:guest", "guest:wrong")
    with pytest.raises(CredentialsError, match="user or the password") as refused:
        broker_facts(BrokerConfig(url=url))
    assert "wrong" not in str(refused.value)
    with pytest.raises(CredentialsError, match=r"virtual host.*not found"):
        broker_facts(BrokerConfig(url=vhost + "-absent"))


@pytest.mark.parametrize("limit", ["vhost-limits/{vhost}", "user-limits/guest"])
def test_one_connection_too_many_is_no_refusal(broker: PrivateBroker, vhost: str, limit: str) -> None:
    """After a cut network the connections of before count for a while: a worker that starts then must wait, not end."""
    path = f"/{limit.format(vhost=vhost.rpartition('/')[2])}/max-connections"
    api(broker, "PUT", path, {"value": 0})
    try:
        with pytest.raises(BrokerUnavailableError, match=r"limit \(0\) is reached"):
            broker_facts(BrokerConfig(url=vhost))
    finally:
        api(broker, "DELETE", path)
    assert broker_facts(BrokerConfig(url=vhost)).product == "RabbitMQ"


def test_submit_prints_the_id_and_the_job_is_in_the_queue(settings: BrokerConfig) -> None:
    with reeld("submit", "--pool", POOL, "--prompt", "a fox", "--seed", "7", url=settings.url) as process:
        job_id = line_of(process.stdout)
        assert process.wait(30) == 0
    with channel_on(settings.url) as channel:
        properties, body = take(channel, TOPOLOGY.jobs_queue)
    job = json.loads(body)
    assert properties.message_id == job["job_id"] == job_id
    assert (job["task"], job["prompt"], job["parameters"]) == ("text_to_video", "a fox", {"seed": 7})


def test_submit_to_an_unknown_pool_ends_with_78_in_one_line(settings: BrokerConfig) -> None:
    with reeld("submit", "--pool", "nobody", "--prompt", "a fox", url=settings.url) as process:
        _, said = process.communicate(timeout=30)
    assert process.returncode == 78
    assert len(said.splitlines()) == 1
    assert "'nobody'" in said
    assert "reeld topology apply" in said


RESULT = {
    "video": {
        "path": "/o/v.mp4", "uri": "file:///o/v.mp4", "sha256": "ab12", "bytes": 9,
        "width": 96, "height": 64, "num_frames": 17, "fps": 8, "codec": "h264",
    },
    "plan": {"seed": 7},
    "timings": {"generate_seconds": 1.5},
    "manifest": "/o/m.json",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "status", "said"),
    [
        ("succeeded", {"result": RESULT}, 0, "file:///o/v.mp4"),
        (
            "failed",
            {"code": "malformed_job", "path": "prompt", "message": "missing"},
            3,
            "malformed_job (prompt): missing",
        ),
        ("cancelled", {}, 3, "was cancelled"),
    ],
)
def test_submit_wait_follows_the_job_to_its_end(
    settings: BrokerConfig, name: str, data: dict[str, Any], status: int, said: str
) -> None:
    """Progress goes to stderr; the result to stdout with 0, a failure to stderr in one line with 3."""
    arguments = ("submit", "--pool", POOL, "--prompt", "a fox", "--wait", "--timeout", "30")
    with reeld(*arguments, url=settings.url) as process:
        job_id = line_of(process.stdout)  # printed once the queue is bound and the job is published
        step = {"phase": "denoise", "step": 1, "steps": 8}
        send(settings.url, job_event("progress", job_id=job_id, worker_id="w", data=step))
        send(settings.url, job_event(name, job_id=job_id, worker_id="w", data=data))
        out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert "denoise 1/8" in err
    assert said in (out if status == 0 else err.splitlines()[-1])


def test_submit_wait_is_not_ended_by_a_job_whose_id_begins_like_its_own(settings: BrokerConfig) -> None:
    arguments = ("submit", "--pool", POOL, "--prompt", "a fox", "--job-id", "fox", "--wait", "--timeout", "30")
    with reeld(*arguments, url=settings.url) as process:
        assert line_of(process.stdout) == "fox"
        send(settings.url, job_event("cancelled", job_id="fox.1", worker_id="w", data={}))
        send(settings.url, job_event("succeeded", job_id="fox", worker_id="w", data={"result": RESULT}))
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


def test_submit_wait_gives_up_after_its_timeout(settings: BrokerConfig) -> None:
    arguments = ("submit", "--pool", POOL, "--prompt", "a fox", "--wait", "--timeout", "0.5")
    with reeld(*arguments, url=settings.url) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"reeld watch --job {out.strip()}" in err


def test_watch_prints_json_lines_until_interrupted(settings: BrokerConfig) -> None:
    """Each event is one line of the very JSON that was published; Ctrl-C is a normal end."""
    event = job_event("started", job_id="a", worker_id="w", data={"attempt": 1})
    with reeld("watch", "--json", url=settings.url) as process:
        seen = _first_line(process, settings.url, event)
        assert seen.encode() == event.body
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert err == ""


def test_watch_shows_heartbeats_as_lines(settings: BrokerConfig) -> None:
    data = {"state": "idle", "ranks": [{"rank": 0, "state": "idle"}]}
    with reeld("watch", "--worker", url=settings.url) as process:
        seen = _first_line(process, settings.url, worker_event("heartbeat", worker_id="w", data=data))
    assert seen.endswith("worker w idle; ranks: 0 idle")


def _first_line(process: subprocess.Popen[str], url: str, event: Event) -> str:
    """Sends the event until the watcher, whose queue may not be bound yet, is seen to be there."""
    with channel_on(url) as channel:
        channel.confirm_delivery()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                channel.basic_publish(TOPOLOGY.status_exchange, event.routing_key, event.body, mandatory=True)
            except pika.exceptions.UnroutableError:  # nobody is bound yet
                time.sleep(0.1)
            else:
                return line_of(process.stdout)
    raise AssertionError("the watcher never bound its queue")


@contextmanager
def control_queue(url: str) -> Iterator[tuple[BlockingChannel, str]]:
    """A queue that hears cancels as a worker's does; a test answers in its place."""
    with channel_on(url) as channel:
        queue = channel.queue_declare("", exclusive=True).method.queue
        assert queue is not None
        channel.queue_bind(queue, TOPOLOGY.control_exchange, "cancel.#")
        yield channel, queue


def noted(job_id: str, worker_id: str, state: str) -> Event:
    data = {"worker_id": worker_id, "state": state, "remembered_seconds": 86400.0}
    return job_event("cancel_noted", job_id=job_id, worker_id=worker_id, data=data)


def asked(channel: BlockingChannel, queue: str) -> str:
    """The routing key of the cancel, once it is there; its body is empty."""
    method, _, body = next(channel.consume(queue, auto_ack=True, inactivity_timeout=20))
    assert method is not None, "no cancel came"
    assert body == b""
    return str(method.routing_key)


def test_cancel_prints_the_answer_of_each_worker(settings: BrokerConfig) -> None:
    """One line a worker: what it knows of the job, and what that means. An id may have dots."""
    with control_queue(settings.url) as (channel, queue), reeld("cancel", "fox.1", url=settings.url) as process:
        assert asked(channel, queue) == "cancel.fox.1"
        send(settings.url, noted("fox.1", "b", "unknown"))
        send(settings.url, noted("fox.1", "a", "running"))
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    first, second = out.splitlines()
    assert first.startswith("b: unknown")
    assert second.startswith("a: running")


def test_cancel_says_when_nobody_listens(settings: BrokerConfig) -> None:
    """No worker is connected: nobody remembers the cancel, so it is an error, with 1."""
    with reeld("cancel", "fox", url=settings.url) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    assert err.startswith("reeld: fox: no worker listens")


def test_cancel_says_when_nobody_answers(settings: BrokerConfig) -> None:
    with control_queue(settings.url), reeld("cancel", "fox", url=settings.url) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert "no worker answered in" in err


def test_cancel_of_what_is_no_id_is_wrong_usage(settings: BrokerConfig) -> None:
    with reeld("cancel", "a/b", url=settings.url) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "a/b" in err


@pytest.mark.parametrize(
    ("state", "end", "status"),
    [("running", "cancelled", 0), ("unknown", "cancelled", 0), ("finishing", "succeeded", 1), ("running", "failed", 1)],
)
def test_cancel_wait_ends_with_the_job(settings: BrokerConfig, state: str, end: str, status: int) -> None:
    """0 when it ended as cancelled; 1 when the cancel came too late."""
    arguments = ("cancel", "fox", "--wait", "--timeout", "30")
    with control_queue(settings.url) as (channel, queue), reeld(*arguments, url=settings.url) as process:
        asked(channel, queue)
        send(settings.url, noted("fox", "w", state))
        send(settings.url, job_event(end, job_id="fox", worker_id="w", data={"result": RESULT}))
        out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert out.splitlines()[0].startswith(f"w: {state}")
    assert f"job fox {end}" in (out if status == 0 else err).replace("was ", "")


def test_cancel_wait_does_not_wait_for_a_job_that_was_done(settings: BrokerConfig) -> None:
    with control_queue(settings.url) as (channel, queue), reeld("cancel", "fox", "--wait", url=settings.url) as process:
        asked(channel, queue)
        send(settings.url, noted("fox", "w", "succeeded"))
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "job fox succeeded" in err


def test_cancel_wait_gives_up_after_its_timeout(settings: BrokerConfig) -> None:
    arguments = ("cancel", "fox", "--wait", "--timeout", "3")
    with control_queue(settings.url) as (channel, queue), reeld(*arguments, url=settings.url) as process:
        asked(channel, queue)
        send(settings.url, noted("fox", "w", "unknown"))
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "not ended after 3 s" in err
