"""What reeld adds to pika's connection, against a peer that says exactly what it is told: nothing, or half a login."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pika.adapters.utils.io_services_utils
import pytest

from daemon.connection import backoff_seconds, connect
from daemon.errors import BrokerUnavailableError, ConfigError
from daemon.sections import BrokerConfig

pytestmark = pytest.mark.usefixtures("pikas_sockets")


def _method(class_id: int, method_id: int, arguments: bytes) -> bytes:
    payload = struct.pack(">HH", class_id, method_id) + arguments
    return struct.pack(">BHI", 1, 0, len(payload)) + payload + b"\xce"


def _long(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


_START = _method(10, 10, b"\x00\x09" + _long(b"") + _long(b"PLAIN") + _long(b"en_US"))


@contextmanager
def _peer(talk: Callable[[socket.socket], object]) -> Iterator[BrokerConfig]:
    """A server on loopback that accepts one connection and talks on it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                talk(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"amqp://guest:guest@127.0.0.1:{server.getsockname()[1]}/%2F"
        yield BrokerConfig(url=url, connect_timeout_seconds=0.5, heartbeat_seconds=5)
        thread.join(20)


@pytest.mark.parametrize("outage_seconds", [0.1, 4, 60, 3600])
def test_pauses_grow_with_the_outage_and_end_soon_after_it(outage_seconds: float) -> None:
    """A broker that is back is tried again within a fifth of its absence, and is not hammered while it is away."""
    broker = BrokerConfig(url="amqp://broker", backoff_initial_seconds=0.5, backoff_max_seconds=30)
    waited, tries, pauses = 0.0, 0, set()
    while waited <= outage_seconds:
        pause = backoff_seconds(broker, waited_seconds=waited)
        assert 0 <= pause <= min(30, max(0.5, waited / 5))
        waited, tries = waited + pause, tries + 1
        pauses.add(pause)
    assert waited <= outage_seconds + max(0.5, outage_seconds / 5)
    assert tries < 150 + outage_seconds / 5
    assert len(pauses) == tries, "no jitter"


def test_a_login_that_is_cut_off_is_no_refused_password() -> None:
    """A connection that ends in the middle of the login may be a broker that stops: it is tried again."""

    def talk(client: socket.socket) -> None:
        client.recv(8)
        client.sendall(_START)
        client.recv(4096)

    with _peer(talk) as broker, pytest.raises(BrokerUnavailableError, match="before the login was through"):
        connect(broker, name="test")


def test_a_reset_while_connecting_means_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy whose broker is away accepts and resets at once. When that comes between two of pika's calls, pika raises
    ValueError out of its loop, which ended the publisher's thread. The moment is forced here, the reset is real."""
    connected, reset = threading.Event(), threading.Event()
    connector = pika.adapters.utils.io_services_utils._AsyncStreamConnector
    begin = connector.__init__

    def begin_late(*args: Any, **kwargs: Any) -> None:
        connected.set()
        assert reset.wait(10)
        begin(*args, **kwargs)

    def talk(client: socket.socket) -> None:
        connected.wait(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        reset.set()

    monkeypatch.setattr(connector, "__init__", begin_late)
    with _peer(talk) as broker, pytest.raises(BrokerUnavailableError, match="reset while connecting"):
        connect(broker, name="test")


def test_a_broker_that_says_nothing_is_unavailable() -> None:
    """A peer that accepts and is silent, as in a black hole, is unavailable after the timeout."""
    closed = threading.Event()
    with _peer(lambda client: closed.wait(30)) as broker:
        with pytest.raises(BrokerUnavailableError, match="StackTimeout"):
            connect(broker, name="test")
        closed.set()


def test_a_name_that_does_not_resolve_is_said() -> None:
    """The host is named in words, not by a number of the resolver's; it may be there later."""
    with pytest.raises(BrokerUnavailableError, match=r"the name nowhere\.invalid does not resolve"):
        connect(BrokerConfig(url="amqp://u:p@nowhere.invalid/", connect_timeout_seconds=20), name="test")


@pytest.mark.parametrize(
    "query", ["heartbeat=soon", "colour=red", "client_properties=f(", "ssl_options=1", "heartbeat=1&heartbeat=2"]
)
def test_a_parameter_of_the_url_that_means_nothing_is_a_fault_of_the_configuration(query: str) -> None:
    """It will not pass, so it is not tried again."""
    with pytest.raises(ConfigError, match="behind the \\?"):
        connect(BrokerConfig(url=f"amqp://u:p@127.0.0.1:1/?{query}"), name="test")


def test_silence_is_noticed_soon_after_the_heartbeat() -> None:
    """Silence that begins at any time is noticed soon; pika's own check takes 20 s here."""
    closed = threading.Event()

    def talk(client: socket.socket) -> None:
        client.recv(8)
        client.sendall(_START)
        client.recv(4096)
        client.sendall(_method(10, 30, struct.pack(">HIH", 0, 131072, 5)))
        client.recv(4096)
        client.sendall(_method(10, 41, b"\x00"))
        time.sleep(1)  # alive for a while, so that pika's first look finds something
        client.sendall(b"\x08\x00\x00\x00\x00\x00\x00\xce")
        closed.wait(60)

    with _peer(talk) as broker:
        connection = connect(broker, name="test")
        begun = time.monotonic()
        with pytest.raises(pika.exceptions.AMQPHeartbeatTimeout):
            connection.process_data_events(time_limit=60)
        assert time.monotonic() - begun < 16
        closed.set()
