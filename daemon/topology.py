"""The broker's objects that reeld needs: what they are, and declaring or checking them.

Owns the names and arguments of every exchange, queue and binding. Leaves out connecting
(`daemon.connection`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection

from daemon.config import Config
from daemon.errors import ConfigError
from daemon.events import TERMINAL

# Of the queues that people look into. To look at a message is a delivery, and past the limit, which is 20 by default
# from 4.0 on, the broker drops it. -1 means none there, but loses it on 3.10 at the first return.
_NO_LIMIT = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Binding:
    """From an exchange to a queue, or, with `to_exchange`, to another exchange (RabbitMQ's extension)."""

    exchange: str
    destination: str
    routing_key: str
    to_exchange: bool = False


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as planned; `text` is a line for an operator."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything one pool needs on the broker."""

    prefix: str
    pool: str
    delivery_limit: int
    retry_delays_seconds: tuple[int, ...]
    max_length: int | None = None
    unrouted_max_length: int = 10_000

    @property
    def jobs_exchange(self) -> str:
        return f"{self.prefix}.jobs"

    @property
    def jobs_queue(self) -> str:
        return f"{self.prefix}.jobs.{self.pool}"

    @property
    def dead_exchange(self) -> str:
        return f"{self.prefix}.dead"

    @property
    def dead_queue(self) -> str:
        return f"{self.prefix}.jobs.{self.pool}.dead"

    @property
    def status_exchange(self) -> str:
        return f"{self.prefix}.status"

    @property
    def control_exchange(self) -> str:
        return f"{self.prefix}.control"

    @property
    def unrouted(self) -> str:
        return f"{self.prefix}.unrouted"

    @property
    def unrouted_terminal(self) -> str:
        """Lets only terminal events through: heartbeats and progress would push them out of the bounded queue."""
        return f"{self.prefix}.unrouted.terminal"

    def retry_queue(self, delay_seconds: int) -> str:
        return f"{self.jobs_queue}.retry.{delay_seconds}s"

    def exchanges(self) -> list[Exchange]:
        return [
            Exchange(self.jobs_exchange, "direct"),
            Exchange(self.dead_exchange, "direct"),
            Exchange(self.unrouted, "fanout"),
            Exchange(self.unrouted_terminal, "topic"),
            Exchange(self.status_exchange, "topic", {"alternate-exchange": self.unrouted}),
            Exchange(self.control_exchange, "topic"),
        ]

    def queues(self) -> list[Queue]:
        # At-least-once dead-lettering silently falls back to at-most-once without overflow=reject-publish.
        quorum = {"x-queue-type": "quorum", "x-overflow": "reject-publish"}
        jobs = {
            **quorum,
            "x-delivery-limit": self.delivery_limit,
            "x-dead-letter-exchange": self.dead_exchange,
            "x-dead-letter-routing-key": self.pool,
            "x-dead-letter-strategy": "at-least-once",
        }
        if self.max_length is not None:
            jobs["x-max-length"] = self.max_length
        retries = [
            Queue(
                self.retry_queue(delay),
                {
                    **quorum,
                    "x-message-ttl": delay * 1000,
                    "x-dead-letter-exchange": self.jobs_exchange,
                    "x-dead-letter-routing-key": self.pool,
                    "x-dead-letter-strategy": "at-least-once",
                },
            )
            for delay in self.retry_delays_seconds
        ]
        return [
            Queue(self.jobs_queue, jobs),
            *retries,
            Queue(self.dead_queue, {"x-queue-type": "quorum", "x-delivery-limit": _NO_LIMIT}),
            Queue(
                self.unrouted,
                {
                    "x-queue-type": "quorum",  # all are: while a classic queue's node is away, a declare answers 404
                    "x-max-length": self.unrouted_max_length,
                    "x-overflow": "drop-head",
                    "x-delivery-limit": _NO_LIMIT,
                },
            ),
        ]

    def bindings(self) -> list[Binding]:
        return [
            Binding(self.jobs_exchange, self.jobs_queue, self.pool),
            Binding(self.dead_exchange, self.dead_queue, self.pool),
            Binding(self.unrouted, self.unrouted_terminal, "", to_exchange=True),
            # Not `job.*`: a job's id may have dots.
            *(Binding(self.unrouted_terminal, self.unrouted, f"job.#.{name}") for name in TERMINAL),
        ]

    def plan_lines(self) -> list[str]:
        """The topology as text, one object a line."""
        return [
            *(f"exchange {e.name}  {e.kind}{_arguments(e.arguments)}" for e in self.exchanges()),
            *(f"queue    {q.name}{_arguments(q.arguments)}" for q in self.queues()),
            *(f"binding  {b.exchange} -> {b.destination}  key {b.routing_key!r}" for b in self.bindings()),
        ]


def topology_of(config: Config) -> Topology:
    """The topology that a configuration asks for."""
    return Topology(
        prefix=config.broker.prefix,
        pool=config.pool_name,
        delivery_limit=config.topology.delivery_limit,
        retry_delays_seconds=config.topology.retry_delays_seconds,
        max_length=config.topology.max_length,
        unrouted_max_length=config.topology.unrouted_max_length,
    )


def apply_topology(connection: BlockingConnection, topology: Topology) -> list[Difference]:
    """Declares what is missing. Returns what exists already but differently; that is left as it is."""
    return list(_declare_each(connection, topology))


def check_topology(connection: BlockingConnection, topology: Topology) -> list[Difference]:
    """Compares the broker with the plan and creates nothing.

    An object that exists is declared again with the planned arguments: the broker answers
    PRECONDITION_FAILED, with both values, when they differ. Bindings cannot be asked for over AMQP 0-9-1.
    """
    missing = list(_missing(connection, topology))
    absent = {difference.name for difference in missing}
    return missing + list(_declare_each(connection, topology, skip=absent, bind=False))


def prepare_topology(connection: BlockingConnection, topology: Topology, *, apply: bool) -> None:
    """What a daemon does before it consumes: declares the topology, or only checks it.

    Raises ConfigError with every difference, one a line.
    """
    differences = apply_topology(connection, topology) if apply else check_topology(connection, topology)
    if differences:
        raise ConfigError(
            "\n".join(["topology differs; see `reeld topology check`", *(each.text for each in differences)])
        )


def _missing(connection: BlockingConnection, topology: Topology) -> Iterator[Difference]:
    for exchange in topology.exchanges():
        if (text := _attempt(connection, lambda c, e=exchange: c.exchange_declare(e.name, passive=True))) is not None:
            yield Difference(exchange.name, f"- exchange {exchange.name}: missing ({text})")
    for queue in topology.queues():
        if (text := _attempt(connection, lambda c, q=queue: c.queue_declare(q.name, passive=True))) is not None:
            yield Difference(queue.name, f"- queue {queue.name}: missing ({text})")


def _declare_each(
    connection: BlockingConnection, topology: Topology, *, skip: set[str] | None = None, bind: bool = True
) -> Iterator[Difference]:
    skip = skip or set()
    for exchange in topology.exchanges():
        if exchange.name in skip:
            continue
        text = _attempt(
            connection,
            lambda c, e=exchange: c.exchange_declare(e.name, e.kind, durable=True, arguments=dict(e.arguments)),
        )
        if text is not None:
            yield Difference(exchange.name, f"~ exchange {exchange.name}: {text}")
    for queue in topology.queues():
        if queue.name in skip:
            continue
        text = _attempt(
            connection, lambda c, q=queue: c.queue_declare(q.name, durable=True, arguments=dict(q.arguments))
        )
        if text is not None:
            yield Difference(queue.name, f"~ queue {queue.name}: {text}")
    if bind:
        for binding in topology.bindings():
            text = _attempt(connection, lambda c, b=binding: _bind(c, b))
            if text is not None:
                yield Difference(binding.destination, f"~ binding {binding.exchange} -> {binding.destination}: {text}")


def _bind(channel: BlockingChannel, binding: Binding) -> None:
    if binding.to_exchange:
        channel.exchange_bind(binding.destination, binding.exchange, routing_key=binding.routing_key)
    else:
        channel.queue_bind(binding.destination, binding.exchange, routing_key=binding.routing_key)


def _attempt(connection: BlockingConnection, declare: Any) -> str | None:
    """Runs one declaration on a channel of its own: a refusal closes the channel. None when it held."""
    channel: BlockingChannel = connection.channel()
    try:
        declare(channel)
    except pika.exceptions.ChannelClosedByBroker as error:
        return f"{error.reply_code} {error.reply_text}"
    channel.close()
    return None


def _arguments(arguments: dict[str, Any]) -> str:
    return "".join(f"  {key}={value}" for key, value in arguments.items())
