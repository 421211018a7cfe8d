"""The proxy and the node that the tests of faults stand on: each fault is what it says, seen by a plain client."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pika
import pika.exceptions
import pytest

from ops.private_broker import PrivateBroker
from tests.harness import until
from tests.node import Node
from tests.proxy import TO_BROKER, TO_CLIENT, Proxy


@pytest.fixture
def proxy(broker: PrivateBroker) -> Iterator[Proxy]:
    with Proxy(broker.amqp_port) as proxy:
        yield proxy


def _connect(url: str, *, name: str = "client", **parameters: object) -> pika.BlockingConnection:
    chosen = pika.URLParameters(url)
    chosen.client_properties = {"connection_name": name}
    chosen.connection_attempts, chosen.socket_timeout = 1, 5
    for key, value in parameters.items():
        setattr(chosen, key, value)
    return pika.BlockingConnection(chosen)


def _publisher(connection: pika.BlockingConnection) -> "pika.adapters.blocking_connection.BlockingChannel":
    channel = connection.channel()
    channel.confirm_delivery()
    return channel


def _answers(port: int) -> bool:
    """Whether AMQP's first word is answered within a second; the connection itself is made in any case."""
    with socket.create_connection(("127.0.0.1", port), timeout=1) as client:
        client.sendall(b"AMQP\x00\x00\x09\x01")
        try:
            return client.recv(1) != b""
        except TimeoutError:
            return False


def test_it_passes_everything_on(proxy: Proxy, vhost: str) -> None:
    """Through the proxy a client publishes and consumes as without it, bodies of several frames included."""
    body = bytes(range(256)) * 2000
    with _connect(proxy.through(vhost)) as connection:
        channel = _publisher(connection)
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.basic_publish("", queue, body, mandatory=True)
        _, _, received = next(channel.consume(queue, inactivity_timeout=20))
        assert received == body
        assert proxy.names() == ["client"]


def test_reset_ends_the_named_connection_only(proxy: Proxy, vhost: str) -> None:
    """A reset reaches the client as ECONNRESET, and leaves connections of another name alone."""
    with _connect(proxy.through(vhost), name="stays") as other:
        connection = _connect(proxy.through(vhost), name="goes")
        assert proxy.reset("goes") == 1
        with pytest.raises(pika.exceptions.StreamLostError, match="ConnectionResetError"):
            connection.process_data_events(time_limit=10)
        other.channel().close()


def test_a_stall_delays_and_loses_nothing(proxy: Proxy, vhost: str) -> None:
    """What was sent during a stall arrives after it."""
    with _connect(proxy.through(vhost)) as connection:
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).method.queue
        proxy.stall()
        channel.basic_publish("", queue, b"late")
        connection.process_data_events(time_limit=0.2)
        proxy.heal()
        method, _, body = next(channel.consume(queue, inactivity_timeout=20))
        assert (body, method is not None) == (b"late", True)


def test_a_black_hole_answers_nothing_and_closes_nothing(proxy: Proxy, broker: PrivateBroker, vhost: str) -> None:
    """In a black hole nothing is answered, no close comes through, and a new connection is as mute."""
    connection = _connect(proxy.through(vhost), name="lost")
    proxy.black_hole()
    with _connect(broker.amqp_url) as direct:  # the broker is well
        direct.channel().close()
    connection.process_data_events(time_limit=0.2)
    assert connection.is_open
    assert not _answers(proxy.port)
    proxy.reset("lost")
    with pytest.raises(pika.exceptions.StreamLostError):
        connection.process_data_events(time_limit=20)
    proxy.heal()
    _connect(proxy.through(vhost)).close()


def test_refused_connections_leave_open_ones_alone(proxy: Proxy, vhost: str) -> None:
    """New connections get ECONNREFUSED until the proxy is healed; the open one goes on."""
    with _connect(proxy.through(vhost)) as connection:
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", proxy.port), timeout=5)
        connection.channel().close()
        proxy.heal()
        _connect(proxy.through(vhost)).close()


def test_dripping_bytes_still_make_frames(proxy: Proxy, vhost: str) -> None:
    """A connection whose bytes come five at a time works, slowly."""
    proxy.drip(5, every_seconds=0.001)
    with _connect(proxy.through(vhost)) as connection:
        connection.channel().close()


def test_a_lost_confirm_is_a_wait_without_end(proxy: Proxy, vhost: str) -> None:
    """A lost confirm leaves the publisher waiting on a live connection, although the message has arrived."""
    connection = _connect(proxy.through(vhost))
    channel = _publisher(connection)
    queue = channel.queue_declare("", auto_delete=True).method.queue
    lost = proxy.lose("Basic.Ack", TO_CLIENT)
    ended: list[BaseException] = []

    def publish() -> None:
        try:
            channel.basic_publish("", queue, b"there")
        except pika.exceptions.AMQPError as error:
            ended.append(error)

    waiting = threading.Thread(target=publish)
    waiting.start()
    lost.wait()
    with _connect(vhost) as other:
        _, _, body = next(other.channel().consume(queue, inactivity_timeout=20))
        assert body == b"there"
    assert waiting.is_alive()
    proxy.reset()
    waiting.join(20)
    assert len(ended) == 1


def test_a_held_ack_never_reaches_the_broker(proxy: Proxy, vhost: str) -> None:
    """A reset while an ack is held back has the broker deliver the message again; after a release it counts."""
    with _connect(vhost) as direct:
        queue = direct.channel().queue_declare("", auto_delete=False, durable=True).method.queue
        direct.channel().basic_publish("", queue, b"job")
        for release in (False, True):
            held = proxy.hold("Basic.Ack", TO_BROKER)
            connection = _connect(proxy.through(vhost))
            channel = connection.channel()
            method, _, body = next(channel.consume(queue, inactivity_timeout=20))
            assert (body, method.redelivered) == (b"job", release)
            channel.basic_ack(method.delivery_tag)
            connection.process_data_events(time_limit=0)
            assert held.wait().method == "Basic.Ack"
            if release:
                proxy.release(held)
                connection.close()
            else:
                proxy.reset()
                with pytest.raises(pika.exceptions.StreamLostError):
                    connection.process_data_events(time_limit=20)
        assert direct.channel().queue_declare(queue, passive=True).method.message_count == 0


def test_what_is_not_amqp_goes_through(broker: PrivateBroker) -> None:
    """Any protocol can be behind it: here the management API's HTTP."""
    assert broker.management_port is not None
    with (
        Proxy(broker.management_port) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client,
    ):
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_node_can_be_paused_alarmed_and_restarted(tmp_path: Path) -> None:
    """A paused node answers nothing until it is resumed, an alarmed one blocks publishers, a restarted one keeps its
    data."""
    with Node(tmp_path) as node:
        blocked = threading.Event()
        connection = _connect(node.amqp_url)
        connection.add_on_connection_blocked_callback(lambda *_: blocked.set())
        channel = connection.channel()
        channel.queue_declare("kept", durable=True)
        channel.basic_publish("", "kept", b"1", pika.BasicProperties(delivery_mode=2))
        node.pause()
        assert not _answers(node.amqp_port)
        node.resume()
        until(lambda: _answers(node.amqp_port))
        connection.channel().close()
        node.raise_memory_alarm()
        channel.basic_publish("", "kept", b"2")
        while not blocked.is_set():
            connection.process_data_events(time_limit=1)
        node.clear_memory_alarm()
        assert "kept" in [queue["name"] for queue in node.api("GET", "/queues")]
        node.restart()
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            connection.process_data_events(time_limit=20)
        with _connect(node.amqp_url) as again:
            assert next(again.channel().consume("kept", inactivity_timeout=20))[2] == b"1"
