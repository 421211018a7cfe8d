"""The other side of the exchanges: publishing jobs, following events, telling workers.

Owns what the `reeld` command does on the broker, with pika's errors translated. Each object owns one
connection and is used by one thread. Leaves out the daemon's own consuming and publishing, dead
letters (`daemon.dead_letters`), and how anything is shown.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingConnection

from daemon.broker_url import redacted
from daemon.connection import LOST, connect
from daemon.errors import (
    BrokerUnavailableError,
    ConfigError,
    CredentialsError,
    FatalError,
    PublishError,
    UnroutablePublishError,
)
from daemon.sections import BrokerConfig
from daemon.topology import Difference, Topology, apply_topology, check_topology

_T = TypeVar("_T")

ACCESS_REFUSED = 403
NOT_FOUND = 404


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedEvent:
    """An event as it came. `name` is the last word of the routing key; `data` is empty when there is none."""

    routing_key: str
    name: str
    event_id: str
    time: str
    data: dict[str, Any]
    body: str

    @property
    def is_job(self) -> bool:
        return self.routing_key.startswith("job.")


def parse_event(routing_key: str, body: bytes) -> ReceivedEvent:
    """Reads a CloudEvent leniently: a watcher shows what it does not understand, too."""
    text = body.decode("utf-8", errors="replace")
    try:
        envelope = json.loads(text)
    except (ValueError, RecursionError):
        envelope = None
    if not isinstance(envelope, dict):
        envelope = {}
    data = envelope.get("data")
    return ReceivedEvent(
        routing_key=routing_key,
        name=routing_key.rpartition(".")[2],
        event_id=str(envelope.get("id", "")),
        time=str(envelope.get("time", "")),
        data=data if isinstance(data, dict) else {},
        body=text,
    )


class EventStream:
    """Events of `<prefix>.status` in an exclusive queue of our own.

    The queue is bound when the constructor returns: events published later are not missed. Raises ConfigError
    when the exchange does not exist. Any method raises BrokerUnavailableError when the connection is lost.
    """

    def __init__(self, broker: BrokerConfig, routing_keys: list[str]) -> None:
        self._address = redacted(broker.resolved_url())
        self._received: deque[ReceivedEvent] = deque()
        self._cancelled = False
        self._connection = connect(broker, name="reeld events")
        exchange = f"{broker.prefix}.status"
        try:
            self._channel = self._connection.channel()
            queue = self._channel.queue_declare("", exclusive=True).method.queue
            assert queue is not None
            for routing_key in routing_keys:
                self._channel.queue_bind(queue, exchange, routing_key=routing_key)
            self._channel.add_on_cancel_callback(self._on_cancel)
            self._channel.basic_consume(queue, self._on_message, auto_ack=True)
        except LOST as error:
            close(self._connection)
            raise translated(error, self._address, f"exchange {exchange}") from error

    def next(self, timeout_seconds: float) -> ReceivedEvent | None:
        """The next event, or None when none comes in time."""
        deadline = time.monotonic() + timeout_seconds
        while not self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                self._connection.process_data_events(time_limit=left)
            except LOST as error:
                raise translated(error, self._address, "the event queue") from error
            # Neither a closed channel nor a deleted queue shows in process_data_events.
            if not self._received and (self._cancelled or not self._channel.is_open):
                raise BrokerUnavailableError(f"{self._address}: the broker closed the event queue")
        return self._received.popleft()

    def count(self, queue: str) -> int | None:
        """How many messages wait in a queue, asked over the same connection. None when there is no such queue."""
        try:
            return count_messages(self._connection, queue)
        except LOST as error:
            raise translated(error, self._address, f"queue {queue}") from error

    def close(self) -> None:
        close(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_message(self, _channel: object, method: Any, _properties: object, body: bytes) -> None:
        self._received.append(parse_event(method.routing_key, body))

    def _on_cancel(self, _frame: object) -> None:
        self._cancelled = True


def publish_job(
    broker: BrokerConfig,
    *,
    pool: str,
    body: bytes,
    message_id: str,
    expiration_seconds: float | None = None,
    reply_to: str | None = None,
    correlation_id: str | None = None,
) -> None:
    """Publishes one job: persistent, mandatory, confirmed.

    Raises UnroutablePublishError when there is no such pool, PublishError when the broker refused the message
    (a full queue) or did not confirm it in `broker.confirm_timeout_seconds`.
    """
    properties = pika.BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=pika.DeliveryMode.Persistent.value,
        message_id=message_id,
        expiration=None if expiration_seconds is None else str(round(expiration_seconds * 1000)),
        reply_to=reply_to,
        correlation_id=correlation_id,
        timestamp=int(time.time()),
        app_id="reeld",
    )
    exchange = f"{broker.prefix}.jobs"
    address = redacted(broker.resolved_url())
    no_pool = f"{address}: no pool {pool!r} behind the exchange {exchange}: start its worker, or `reeld topology apply`"

    def publish() -> None:
        connection = connect(broker, name="reeld submit")
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish(exchange, pool, body, properties, mandatory=True)
        except pika.exceptions.UnroutableError as error:
            raise UnroutablePublishError(no_pool) from error
        except pika.exceptions.NackError as error:
            raise PublishError(
                f"{address}: the pool {pool!r} takes no more jobs now (queue full); try later"
            ) from error
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code == NOT_FOUND:
                raise UnroutablePublishError(no_pool) from error
            raise translated(error, address, f"exchange {exchange}") from error
        except LOST as error:
            raise translated(error, address, f"exchange {exchange}") from error
        finally:
            close(connection)

    _within(
        broker.connect_timeout_seconds + 5 + broker.confirm_timeout_seconds,
        publish,
        f"{address}: the broker did not confirm the job in time (memory or disk alarm?); it may still be queued",
    )


def tell_workers(broker: BrokerConfig, routing_key: str) -> None:
    """Publishes a control message (`cancel.<job_id>`, `drain.<worker_id>`), mandatory and confirmed.

    Raises UnroutablePublishError when no worker listens for it.
    """
    exchange = f"{broker.prefix}.control"
    address = redacted(broker.resolved_url())
    with _channel_of(broker, "reeld control", f"exchange {exchange}") as channel:
        channel.confirm_delivery()
        try:
            with channel.connection.deadline(broker.confirm_timeout_seconds, waits_for_alarms=False):
                channel.basic_publish(exchange, routing_key, b"", mandatory=True)
        except pika.exceptions.UnroutableError as error:
            raise UnroutablePublishError(f"{address}: nobody listens for {routing_key} on {exchange}") from error


def apply_on(broker: BrokerConfig, topology: Topology) -> list[Difference]:
    """`daemon.topology.apply_topology` over a connection of its own."""
    return _with_connection(broker, "reeld topology", lambda connection: apply_topology(connection, topology))


def check_on(broker: BrokerConfig, topology: Topology) -> list[Difference]:
    """`daemon.topology.check_topology` over a connection of its own."""
    return _with_connection(broker, "reeld topology", lambda connection: check_topology(connection, topology))


def delete_on(broker: BrokerConfig, topology: Topology) -> None:
    """Deletes everything that a topology names, with what is in it. For objects that one made oneself."""
    with _channel_of(broker, "reeld topology", "the topology") as channel:
        for queue in topology.queues():
            channel.queue_delete(queue.name)
        for exchange in topology.exchanges():
            channel.exchange_delete(exchange.name)


def close(connection: BlockingConnection) -> None:
    """Closes a connection, however much is left of it."""
    try:
        if connection.is_open:
            connection.close()
    except LOST:
        pass  # it is gone: that is what was asked for


def count_messages(connection: BlockingConnection, queue: str) -> int | None:
    """How many messages wait in a queue; None when there is no such queue. Raises one of LOST."""
    channel = connection.channel()
    try:
        ready: int = channel.queue_declare(queue, passive=True).method.message_count
    except pika.exceptions.ChannelClosedByBroker:
        return None
    channel.close()
    return ready


def _with_connection(broker: BrokerConfig, name: str, work: Callable[[BlockingConnection], _T]) -> _T:
    connection = connect(broker, name=name)
    try:
        return work(connection)
    except LOST as error:
        raise translated(error, redacted(broker.resolved_url()), "the topology") from error
    finally:
        close(connection)


@contextmanager
def _channel_of(broker: BrokerConfig, name: str, what: str) -> Iterator[Any]:
    connection = connect(broker, name=name)
    try:
        yield connection.channel()
    except LOST as error:
        raise translated(error, redacted(broker.resolved_url()), what) from error
    finally:
        close(connection)


def translated(error: Exception, address: str, what: str) -> FatalError | BrokerUnavailableError:
    """What one of LOST means, met while using `what`."""
    if isinstance(error, pika.exceptions.ChannelClosedByBroker):
        if error.reply_code == NOT_FOUND:
            return ConfigError(f"{address}: {what} does not exist: run `reeld topology apply`")
        if error.reply_code == ACCESS_REFUSED:
            return CredentialsError(f"{address}: {what}: {error.reply_text}")
        return ConfigError(f"{address}: {what}: {error.reply_code} {error.reply_text}")
    return BrokerUnavailableError(f"{address}: connection lost ({type(error).__name__} {error})".replace("\n", " "))


def _within(seconds: float, work: Callable[[], None], late: str) -> None:
    """Runs `work` in a thread and gives it up after `seconds`: a confirmed publish waits without limit."""
    failures: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - carried over to the caller's thread, which raises it
            failures.append(error)

    thread = threading.Thread(target=guarded, name="publish", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise PublishError(late)
    for failure in failures:
        raise failure
