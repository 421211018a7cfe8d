"""The consumer against a real broker: what a worker that leaves costs the jobs that it never began.

`x-delivery-count` is what counts towards the delivery limit: a quorum queue gives a returned message back before all
others, so workers that drain one after the other would use up the deliveries of the same waiting job.
"""

from collections.abc import Callable, Iterator

import pika
import pytest

from daemon import client
from daemon.consumer import Consumer
from daemon.delivery import Delivery
from daemon.errors import ConfigError
from daemon.presence import Presence
from daemon.sections import BrokerConfig
from daemon.topology import Topology
from ops.private_broker import PrivateBroker
from tests.harness import publish, take, until
from tests.proxy import TO_BROKER, Proxy

TOPOLOGY = Topology(prefix="reeld", pool="test", delivery_limit=3, retry_delays_seconds=(1,))
Consumers = Callable[[], tuple[Consumer, Delivery]]


@pytest.fixture
def proxy(broker: PrivateBroker) -> Iterator[Proxy]:
    with Proxy(broker.amqp_port) as proxy:
        yield proxy


@pytest.fixture
def heard() -> list[str]:
    """The routing keys of the control messages that came."""
    return []


@pytest.fixture
def busy(proxy: Proxy, vhost: str, heard: list[str]) -> Iterator[Consumers]:
    """Makes a consumer that has a job in hand; behind `proxy`."""
    assert client.apply_on(BrokerConfig(url=vhost), TOPOLOGY) == []
    started: list[Consumer] = []

    def start() -> tuple[Consumer, Delivery]:
        publish(vhost, b"{}", message_id="in hand")
        consumer = Consumer(
            BrokerConfig(url=proxy.through(vhost), backoff_initial_seconds=0.1),
            TOPOLOGY,
            worker_id=f"w{len(started)}",
            prepare=lambda _connection: None,
            on_control=heard.append,
            on_heartbeat=Presence("w0").hear,
        )
        started.append(consumer)
        consumer.start()
        delivery = consumer.deliveries.get(timeout=30)
        assert delivery is not None
        return consumer, delivery

    yield start
    for consumer in started:
        consumer.stop()


def _waiting(url: str) -> list[tuple[str, int]]:
    """Every job in the queue with its delivery count."""
    return [
        (properties.message_id, (properties.headers or {}).get("x-delivery-count", 0))
        for properties, _ in take(url, TOPOLOGY.jobs_queue)
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_drain_costs_a_waiting_job_no_delivery(busy: Consumers, vhost: str, workers: int) -> None:
    """Workers that drain one after the other settle their jobs, and the job behind these was never delivered."""
    held = [busy() for _ in range(workers)]
    publish(vhost, b"{}", message_id="waits")
    for consumer, _ in held:
        consumer.drain()
    for consumer, delivery in held:
        consumer.ack(delivery)
        consumer.stop()
        assert consumer.deliveries.get(timeout=10) is None, "ended, with nothing else delivered"
    assert _waiting(vhost) == [("waits", 0)]
    assert take(vhost, TOPOLOGY.dead_queue) == []


def test_a_job_that_is_handed_back_costs_one_delivery(busy: Consumers, vhost: str) -> None:
    """The worker that gives a job back does not get it once more on its way out. From 4.3 on it costs none."""
    consumer, delivery = busy()
    consumer.drain()
    consumer.requeue(delivery)
    consumer.stop()
    ((message_id, count),) = _waiting(vhost)
    assert message_id == "in hand"
    assert count <= 1


def test_a_draining_consumer_is_cancelled_within_a_tick_and_does_not_come_back(
    busy: Consumers, proxy: Proxy, vhost: str
) -> None:
    """The broker is told soon after the drain began, with the job still in hand; a new connection consumes nothing."""
    consumer, delivery = busy()
    cancelled = proxy.hold("Basic.Cancel", TO_BROKER)
    consumer.drain()
    cancelled.wait(timeout=10)
    proxy.release(cancelled)
    opened = proxy.hold("Basic.Qos", TO_BROKER)
    proxy.reset("consumer")
    opened.wait(timeout=20)
    consumer.ack(delivery)  # stale: the job is in the queue again, and could be consumed now
    proxy.release(opened)
    until(lambda: consumer.trouble is None)
    assert "drains" in consumer.status
    assert _waiting(vhost) == [("in hand", 1)], "counted for the connection that was lost"


def test_no_message_to_all_workers_ends_the_consumer(busy: Consumers, vhost: str, heard: list[str]) -> None:
    """A routing key that is no text, and a heartbeat that cannot be read: whoever may publish reaches every worker."""
    consumer, delivery = busy()
    connection = pika.BlockingConnection(pika.URLParameters(vhost))
    channel = connection.channel()
    channel.basic_publish(TOPOLOGY.control_exchange, b"cancel.\xff", b"")
    channel.basic_publish(TOPOLOGY.status_exchange, "worker.w0.heartbeat", b"[" * 100_000)
    channel.basic_publish(TOPOLOGY.control_exchange, "drain.w0", b"")
    connection.close()
    until(lambda: "drain.w0" in heard)
    assert heard == ["cancel.\xff", "drain.w0"]
    assert consumer.fatal is None
    consumer.ack(delivery)
    consumer.stop()
    assert _waiting(vhost) == []


def test_what_fails_on_a_control_message_ends_nothing(vhost: str) -> None:
    """Not even a fault of our own: it is logged, and the next message is heard."""
    assert client.apply_on(BrokerConfig(url=vhost), TOPOLOGY) == []
    heard: list[str] = []

    def hear(routing_key: str) -> None:
        heard.append(routing_key)
        raise ValueError("a fault")

    consumer = Consumer(
        BrokerConfig(url=vhost), TOPOLOGY, worker_id="w", prepare=lambda _connection: None, on_control=hear
    )
    consumer.start()
    try:
        assert consumer.consuming.wait(30)
        for job_id in ("one", "two"):
            client.tell_workers(BrokerConfig(url=vhost), f"cancel.{job_id}")
        until(lambda: len(heard) == 2)
        assert consumer.fatal is None
    finally:
        consumer.stop()


def test_an_outage_is_no_time_in_which_a_topology_could_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that was away for long and comes back without its queues gets the whole patience from then on."""
    clock = 10.0
    monkeypatch.setattr("daemon.consumer.time.monotonic", lambda: clock)
    consumer = Consumer(
        BrokerConfig(),
        TOPOLOGY,
        worker_id="w",
        prepare=lambda _connection: None,
        on_control=lambda _key: None,
        patience_seconds=60,
        served_before=True,
    )
    error = ConfigError("the queue is missing")
    for clock in (10.0, 69.0):  # noqa: B007  read by the lambda
        consumer._on_topology_error(error)
    consumer._on_retry("connection refused", 1.0)
    for clock in (1000.0, 1059.0):  # noqa: B007
        consumer._on_topology_error(error)
    clock = 1061.0
    with pytest.raises(ConfigError):
        consumer._on_topology_error(error)
