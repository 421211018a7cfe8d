"""The private broker: a real RabbitMQ of our own that survives a kill with its data and leaves nothing."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pika
import psutil
import pytest

from ops.private_broker import PrivateBroker, PrivateBrokerError, RabbitMQMissing
from tests.node import DECLARED_SECONDS

DURABLE = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)


def test_a_message_goes_through_a_fresh_virtual_host(vhost: str) -> None:
    """A test's virtual host takes a guest over loopback and delivers what was published."""
    with pika.BlockingConnection(pika.URLParameters(vhost)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.basic_publish("", queue, b"hello", mandatory=True)
        assert receive(channel, queue) == b"hello"


def test_a_virtual_host_sees_nothing_of_the_default_one(broker: PrivateBroker, vhost: str) -> None:
    """Tests are apart from each other: a queue in one virtual host does not exist in another."""
    with (
        pika.BlockingConnection(pika.URLParameters(broker.amqp_url)) as elsewhere,
        pika.BlockingConnection(pika.URLParameters(vhost)) as here,
    ):
        queue = elsewhere.channel().queue_declare("", exclusive=True).method.queue
        with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
            here.channel().queue_declare(queue, passive=True)


def test_rabbitmqctl_reaches_this_broker(broker: PrivateBroker) -> None:
    """Control commands go to this node; one that fails is an error with rabbitmqctl's own words."""
    assert str(broker.folder) in broker.ctl("environment")
    with pytest.raises(PrivateBrokerError, match=r"no_such_vhost|does not exist"):
        broker.ctl("delete_vhost", "nobody-made-this")


def test_a_killed_broker_comes_back_with_its_confirmed_messages(tmp_path: Path) -> None:
    """A durable message that was confirmed outlives SIGKILL, and the address stays the same."""
    with PrivateBroker(tmp_path, plugins=()) as broker:
        url = broker.amqp_url
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.queue_declare("kept", durable=True, arguments={"x-queue-type": "quorum"})
            time.sleep(DECLARED_SECONDS)
            channel.basic_publish("", "kept", b"still here", DURABLE, mandatory=True)
            broker.kill()
            with pytest.raises(pika.exceptions.AMQPConnectionError):
                connection.process_data_events(time_limit=10)

        broker.start()
        assert broker.amqp_url == url
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            assert receive(connection.channel(), "kept") == b"still here"


def _listening(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.NoSuchProcess):  # a helper that lives for milliseconds
        return [each.laddr for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    return []


def test_it_listens_on_loopback_only_and_stop_leaves_nothing(tmp_path: Path) -> None:
    """Nothing of the broker can be reached from outside, and after a stop no process of it is left."""
    ours = psutil.Process()
    before = set(ours.children(recursive=True))
    broker = PrivateBroker(tmp_path)
    broker.start()
    processes = set(ours.children(recursive=True)) - before
    listening = {address for process in processes for address in _listening(process)}
    broker.stop()
    broker.stop()

    assert {broker.amqp_port, broker.management_port} <= {address.port for address in listening}
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}
    assert len(processes) >= 3, "the VM, epmd and the VM's helpers"
    assert still_alive(processes) == []


def test_a_killed_runner_leaves_no_broker_behind(tmp_path: Path) -> None:
    """When the process that started the broker is killed, the kernel ends the broker and its epmd."""
    program = (
        "import sys, pathlib; from ops.private_broker import PrivateBroker;"
        "broker = PrivateBroker(pathlib.Path(sys.argv[1]), plugins=()); broker.start();"
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == b"ready\n"
        processes = set(psutil.Process(runner.pid).children(recursive=True))
        runner.send_signal(signal.SIGKILL)
    assert len(processes) >= 2
    assert still_alive(processes) == []


def test_a_broker_that_cannot_start_says_why(tmp_path: Path) -> None:
    """A configuration that RabbitMQ refuses ends in an error with the end of its log, not in a hang."""
    broker = PrivateBroker(tmp_path, plugins=(), config="no_such_setting = 1\n")
    with pytest.raises(PrivateBrokerError, match=r"(?s)before it was ready.*no_such_setting"):
        broker.start()
    assert broker.pid is None


def test_a_machine_without_rabbitmq_is_told_the_command(tmp_path: Path) -> None:
    """Without RabbitMQ the error is one line with the command that installs it."""
    with pytest.raises(RabbitMQMissing) as caught:
        PrivateBroker(tmp_path, rabbitmq_bin=tmp_path).start()
    message = str(caught.value)
    assert "apt-get install --no-install-recommends rabbitmq-server" in message
    assert "\n" not in message


def test_a_port_taken_in_between_is_replaced_at_the_first_start(tmp_path: Path) -> None:
    """Ports are chosen before they are bound: one that somebody else took meanwhile costs a retry only."""
    broker = PrivateBroker(tmp_path, plugins=())
    wanted = broker.amqp_port
    with socket.create_server(("127.0.0.1", wanted)), broker:
        assert broker.amqp_port != wanted
        pika.BlockingConnection(pika.URLParameters(broker.amqp_url)).close()


def receive(channel: "pika.adapters.blocking_connection.BlockingChannel", queue: str) -> bytes | None:
    """Consume one message: asking for a count or for a get is no proof on a quorum queue just restarted."""
    body: bytes | None
    for method, _, body in channel.consume(queue, inactivity_timeout=20):
        if method is not None:
            channel.basic_ack(method.delivery_tag)
        channel.cancel()
        return body
    return None


def still_alive(processes: set[psutil.Process], *, patience_seconds: float = 10.0) -> list[psutil.Process]:
    """Which of ``processes`` still run after a while; an ended one that nobody has reaped yet has ended."""
    deadline = time.monotonic() + patience_seconds
    while (alive := [each for each in processes if runs(each)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
