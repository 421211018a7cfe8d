"""The publisher against a real broker that takes its connection and then refuses it, or falls silent."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import daemon.publisher
from daemon import client
from daemon.connection import connect
from daemon.errors import FatalError, PublishError
from daemon.message import Message
from daemon.publisher import Publisher
from daemon.sections import BrokerConfig
from daemon.topology import Topology
from ops.private_broker import PrivateBroker
from tests.harness import take, until
from tests.node import api
from tests.proxy import TO_CLIENT, Proxy

pytestmark = pytest.mark.usefixtures("pikas_sockets")

TOPOLOGY = Topology(prefix="reeld", pool="test", delivery_limit=3, retry_delays_seconds=(1,))
LAST_EVENT = Message(
    exchange=TOPOLOGY.status_exchange,
    routing_key="job.fox.succeeded",
    body=b"{}",
    mandatory=True,
    alternate_queue=TOPOLOGY.unrouted,
)


@contextmanager
def publishing(url: str, *, on_failed: Callable[[FatalError], None] = lambda _error: None) -> Iterator[Publisher]:
    publisher = Publisher(
        BrokerConfig(url=url, backoff_initial_seconds=0.2, backoff_max_seconds=1, confirm_timeout_seconds=2),
        worker_id="w",
        on_failed=on_failed,
    )
    publisher.start()
    try:
        yield publisher
    finally:
        publisher.stop()


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.fixture
def user(broker: PrivateBroker, vhost: str) -> Iterator[str]:
    """The URL of a user of its own, who may do everything."""
    assert client.apply_on(BrokerConfig(url=vhost), TOPOLOGY) == []
    name = f"worker-{secrets.token_hex(4)}"
    api(broker, "PUT", f"/users/{name}", {"password": "secret", "tags": ""})
    everything = dict.fromkeys(("configure", "write", "read"), ".*")
    api(broker, "PUT", f"/permissions/{vhost.rpartition('/')[2]}/{name}", everything)
    yield vhost.replace("guest:guest", f"{name}:secret")
    api(broker, "DELETE", f"/users/{name}")


def test_a_refused_channel_is_not_asked_for_in_a_hot_loop(
    broker: PrivateBroker, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that lets us in and refuses the channel (a limit of the user's) is tried again with backoff."""
    connects: list[float] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        connects.append(time.monotonic())
        return connect(*args, **kwargs)

    monkeypatch.setattr(daemon.publisher, "connect", counted)
    limit = f"/user-limits/{user.partition('//')[2].partition(':')[0]}/max-channels"
    api(broker, "PUT", limit, {"value": 0})
    with publishing(user) as publisher:
        with pytest.raises(PublishError) as given_up:
            publisher.publish(LAST_EVENT, give_up=_after(4))
        assert len(connects) < 60
        assert "NOT_ALLOWED" in str(given_up.value)
        assert publisher.trouble == "disconnected"
        api(broker, "DELETE", limit)
        publisher.publish(LAST_EVENT, give_up=_after(20))
    assert len(take(user, TOPOLOGY.unrouted)) == 1


@pytest.mark.parametrize("answer", ["Channel.OpenOk", "Confirm.SelectOk", "Queue.DeclareOk"])
def test_an_answer_that_never_comes_has_a_deadline(broker: PrivateBroker, user: str, answer: str) -> None:
    """Opening the channel, and counting what nobody listened to, wait as long as a confirm; then it is tried again."""
    with Proxy(broker.amqp_port) as proxy:
        lost = proxy.lose(answer, TO_CLIENT)
        with publishing(proxy.through(user)) as publisher:
            publisher.publish(LAST_EVENT, give_up=_after(15))
            lost.wait()
    assert take(user, TOPOLOGY.unrouted)


def test_a_failure_of_the_thread_is_told(user: str) -> None:
    """What nobody foresaw ends the thread, in one line of the log; nobody waits for it, nor calls it connected."""
    told: list[FatalError] = []
    with publishing(user, on_failed=told.append) as publisher:
        publisher.publish(LAST_EVENT, give_up=_after(10))
        assert publisher.trouble is None
        publisher._requests.put(5)  # type: ignore[arg-type]  # the failure
        with pytest.raises(FatalError, match="thread has ended"):
            publisher.publish(LAST_EVENT)
        assert publisher.trouble == "disconnected"
        assert publisher.status.startswith("failed")
    assert len(told) == 1


def test_what_amqp_cannot_carry_fails_alone(user: str) -> None:
    """A number of a message's headers that no field of AMQP holds is its sender's error, and nobody else's."""
    too_large = Message(
        exchange=TOPOLOGY.status_exchange, routing_key="job.fox.succeeded", body=b"{}", headers={"x": 2**64}
    )
    with publishing(user) as publisher:
        publisher.offer(too_large)
        with pytest.raises(PublishError, match="cannot be published"):
            publisher.publish(too_large)
        publisher.publish(LAST_EVENT, give_up=_after(10))
        assert publisher.trouble is None
    assert len(take(user, TOPOLOGY.unrouted)) == 1


def test_what_a_full_queue_refuses_is_trouble(broker: PrivateBroker, user: str) -> None:
    """A full queue of somebody else on the status exchange has the broker refuse every event: that is not healthy."""
    vhost = user.rpartition("/")[2]
    full = {"durable": True, "arguments": {"x-max-length": 0, "x-overflow": "reject-publish"}}
    api(broker, "PUT", f"/queues/{vhost}/full", full)
    api(broker, "POST", f"/bindings/{vhost}/e/{TOPOLOGY.status_exchange}/q/full", {"routing_key": "#"})
    with publishing(user) as publisher:
        with pytest.raises(PublishError, match="a queue is full"):
            publisher.publish(LAST_EVENT, give_up=lambda: publisher.trouble == "rejected")
        assert publisher.trouble is None, "nobody waits for it any more"
        waiting = threading.Thread(target=publisher.publish, args=(LAST_EVENT,))
        waiting.start()
        until(lambda: publisher.trouble == "rejected")
        assert "job.fox.succeeded: the broker refused it: a queue is full" in publisher.status
        api(broker, "DELETE", f"/queues/{vhost}/full")
        waiting.join(30)
        assert (waiting.is_alive(), publisher.trouble, publisher.status) == (False, None, "connected")


def test_a_missing_permission_is_named(broker: PrivateBroker, user: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the broker refuses for want of a permission waits for it; log, status and trouble say so meanwhile."""
    name, vhost = user.partition("//")[2].partition(":")[0], user.rpartition("/")[2]
    ours = dict.fromkeys(("configure", "write", "read"), r"^reeld\.")
    api(broker, "PUT", f"/permissions/{vhost}/{name}", ours)
    copy = Message(exchange="", routing_key=TOPOLOGY.retry_queue(1), body=b"{}", mandatory=True)
    with publishing(user) as publisher:
        late = _after(60)
        with pytest.raises(PublishError, match=r"not confirmed; the broker refuses it.*amq\.default"):
            publisher.publish(copy, give_up=lambda: publisher.trouble == "refused" or late())
        assert publisher.trouble == "refused"
        assert "publish_refused" in capsys.readouterr().out
        api(broker, "PUT", f"/permissions/{vhost}/{name}", {**ours, "write": ".*"})
        publisher.publish(copy, give_up=_after(20))
        assert publisher.trouble is None
