"""What a broker is and what it allows, as far as AMQP can ask.

Owns its introduction, its limits, and trying what cannot be asked for. Leaves out what follows from it (`ops.doctor`).
"""

import re
from dataclasses import dataclass
from typing import Any

import pika.exceptions

from daemon.broker_url import redacted
from daemon.client import close, count_messages, translated
from daemon.connection import LOST, OverdueError, connect
from daemon.sections import BrokerConfig

_PRECONDITION_FAILED = 406
_PROBE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerFacts:
    """What the broker says about itself when a connection is opened. `frame_max` is in bytes, 0: without limit."""

    address: str
    product: str
    version: str
    frame_max: int

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version; (0, 0) for what is no version."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(found[1]), int(found[2])) if found else (0, 0)


def broker_facts(broker: BrokerConfig) -> BrokerFacts:
    """Opens a connection and reads the broker's introduction. Raises what `connect` raises."""
    connection = connect(broker, name="reeld doctor")
    try:
        # pika's blocking connection hides what the broker said in connection.start and connection.tune.
        inner = getattr(connection, "_impl")  # noqa: B009 - private
        properties: dict[str, Any] = inner.server_properties or {}
        frame_max = int(inner.params.frame_max or 0)
    finally:
        close(connection)
    return BrokerFacts(
        address=redacted(broker.resolved_url()),
        product=_text(properties.get("product")),
        version=_text(properties.get("version")),
        frame_max=frame_max,
    )


def refusal_of_message(broker: BrokerConfig, size_bytes: int) -> str | None:
    """Publishes one message of that size to a queue of our own, which goes with the connection.

    None when the broker took it, else why it did not. Raises BrokerUnavailableError.
    """
    connection = connect(broker, name="reeld doctor")
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        queue = channel.queue_declare("", exclusive=True).method.queue
        with connection.deadline(_PROBE_SECONDS, waits_for_alarms=False):
            channel.basic_publish("", queue, b"\0" * size_bytes, mandatory=True)
    except OverdueError:
        blocked = f": it says {connection.blocked}" if connection.blocked else ""
        return f"not confirmed in {_PROBE_SECONDS:g} s{blocked}"
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code == _PRECONDITION_FAILED:
            return str(error.reply_text)
        raise translated(error, redacted(broker.resolved_url()), "a queue of our own") from error
    except LOST as error:
        raise translated(error, redacted(broker.resolved_url()), "a queue of our own") from error
    finally:
        close(connection)
    return None


def count_in_each(broker: BrokerConfig, queues: list[str]) -> dict[str, int]:
    """How many messages wait in each queue that exists. Raises BrokerUnavailableError."""
    connection = connect(broker, name="reeld doctor")
    try:
        counted = {queue: count_messages(connection, queue) for queue in queues}
    except LOST as error:
        raise translated(error, redacted(broker.resolved_url()), "the queues") from error
    finally:
        close(connection)
    return {queue: count for queue, count in counted.items() if count is not None}


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "unknown")
