"""A job's message as the broker delivered it: what its properties and headers say.

Owns the headers that reeld itself puts on a job's copies, and how they are read: whatever is in them came over the
network. Leaves out the body (`daemon.job`), settling (`daemon.consumer`) and what a copy keeps (`daemon.copies`).
"""

import time
from dataclasses import dataclass
from typing import Any

from daemon.copies import short_text

# On a copy that the retry ladder brings back: which try it is, when it expires (Unix time in milliseconds), and how
# often the broker had taken its original back.
ATTEMPT_HEADER = "x-reeld-attempt"
EXPIRES_HEADER = "x-reeld-expires-at"
LOST_HEADER = "x-reeld-lost"

_MOST = 1_000_000  # of attempts and losses, which a publisher may have made up
_LAST_SECOND = 253_402_300_799  # of the year 9999: what is later is no time in seconds


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as it came. `generation` numbers the channel it came on: an ack on another would be a lie."""

    body: bytes
    delivery_tag: int
    generation: int
    redelivered: bool
    message_id: str | None
    correlation_id: str | None
    reply_to: str | None
    expiration: str | None
    content_type: str | None
    priority: int | None
    headers: dict[str, Any]
    expires_at: float | None
    """When the publisher stops caring, as Unix time in seconds (the AMQP property `expiration`, a time to live)."""
    published_at: int | None = None
    """The AMQP property `timestamp`, Unix time in whole seconds, where the publisher says one that can be."""

    @property
    def key(self) -> tuple[int, int]:
        return self.generation, self.delivery_tag

    @property
    def delivery_count(self) -> int:
        """How often the broker has taken this message back already (quorum queues' x-delivery-count)."""
        return self._count("x-delivery-count")

    @property
    def lost_count(self) -> int:
        """How often this message and those it is a copy of were taken back."""
        return self._count(LOST_HEADER) + self.delivery_count

    @property
    def attempt(self) -> int:
        """Which try this is, from 1 on."""
        attempt = self.headers.get(ATTEMPT_HEADER, 1)
        return min(int(attempt), _MOST) if isinstance(attempt, int) and attempt >= 1 else 1

    @property
    def traceparent(self) -> str | None:
        """The publisher's trace (W3C Trace Context), unchecked."""
        value = self.headers.get("traceparent")
        return value if isinstance(value, str) else None

    def _count(self, name: str) -> int:
        count = self.headers.get(name, 0)
        return min(max(0, int(count)), _MOST) if isinstance(count, int) else 0  # pika's own long is an int


def read_delivery(method: Any, properties: Any, body: bytes, *, generation: int) -> Delivery:
    """pika's `Basic.Deliver`, `BasicProperties` and body, on the channel of that number."""
    headers = dict(properties.headers or {})
    return Delivery(
        body=body,
        delivery_tag=method.delivery_tag,
        generation=generation,
        redelivered=method.redelivered,
        message_id=short_text(properties.message_id),
        correlation_id=short_text(properties.correlation_id),
        reply_to=short_text(properties.reply_to),
        expiration=short_text(properties.expiration),
        content_type=short_text(properties.content_type),
        priority=properties.priority,
        headers=headers,
        expires_at=_expires_at(properties, headers),
        published_at=_published_at(properties),
    )


def _expires_at(properties: Any, headers: dict[str, Any]) -> float | None:
    """When the job expires: as its copy says, or counted from when it was published, or else from now.

    The broker says nothing of how long a message has waited. It dead-letters by itself what expires in the queue.
    """
    from_copy = headers.get(EXPIRES_HEADER)
    try:
        if isinstance(from_copy, int):  # pika reads a long as an int of its own
            expires_at = from_copy / 1000
        else:
            expires_at = (_published_at(properties) or time.time()) + int(properties.expiration) / 1000
    except (TypeError, ValueError, OverflowError):
        return None
    return expires_at if 0 <= expires_at <= _LAST_SECOND else None


def _published_at(properties: Any) -> int | None:
    """Some clients count in milli- or nanoseconds, which AMQP does not: then it is not known."""
    timestamp = properties.timestamp
    return timestamp if isinstance(timestamp, int) and 0 <= timestamp <= _LAST_SECOND else None
