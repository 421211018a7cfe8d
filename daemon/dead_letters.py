"""A pool's dead letters: read, requeued or dropped, one by one.

A letter that is read is held, unacked, until it is requeued or dropped, or until the connection is closed: then the
broker puts it back in its old place. So nothing is lost whatever ends this process; a job that was requeued a moment
before may be there twice, which its manifest absorbs. Leaves out which letters are meant, and how they are shown.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

import pika
import pika.exceptions

from daemon.broker_url import redacted
from daemon.client import close, translated
from daemon.connection import LOST, connect
from daemon.copies import REQUEUED_HEADER, own_headers, short_text
from daemon.errors import ErrorCode, PublishError, UnroutablePublishError
from daemon.job import salvage_job_id
from daemon.reporter import TIME_HEADER
from daemon.sections import BrokerConfig

# A larger body is not parsed for its job's id: a hostile one costs many times its size.
_PARSED_BYTES = 1 << 20
_REASONS_KEPT = 5
_REASON_CHARACTERS = 500
# The broker's word for a letter that was delivered too often.
_DELIVERY_LIMIT = "delivery_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A dead letter with its reason. `died_at` is Unix time in seconds, None when nobody noted it.

    `job_id` is the one that a worker noted; else the body's, if that has at most 1 MiB; else the message_id.
    """

    delivery_tag: int
    body: bytes
    headers: dict[str, Any]
    message_id: str | None
    correlation_id: str | None
    reply_to: str | None
    priority: int | None
    content_type: str | None
    job_id: str | None
    code: str
    message: str
    path: str | None
    worker_id: str | None
    died_at: float | None

    @property
    def key(self) -> str:
        """The same for the same letter each time that it is read."""
        headers = {name: self.headers[name] for name in sorted(self.headers) if name not in _BROKERS_OWN}
        return hashlib.sha256(repr((self.message_id, headers)).encode("utf-8", "replace") + self.body).hexdigest()

    @property
    def requeued_from(self) -> list[dict[str, Any]]:
        """What the job had failed of when it was requeued before, the latest last."""
        found = self.headers.get(REQUEUED_HEADER)
        return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


_BROKERS_OWN = ("x-delivery-count", "x-acquired-count")


class DeadLetterQueue:
    """The dead letters of a pool, oldest first, over one connection.

    Raises ConfigError when the pool has no such queue, and what `connect` raises. Any method raises
    BrokerUnavailableError when the connection is lost.
    """

    def __init__(self, broker: BrokerConfig, pool: str) -> None:
        self._broker = broker
        self._pool = pool
        self._address = redacted(broker.resolved_url())
        self._queue = f"{broker.prefix}.jobs.{pool}.dead"
        self._left = 0
        self._connection = connect(broker, name="reeld dead letters")
        try:
            self._channel = self._connection.channel()
            self._channel.queue_declare(self._queue, passive=True)
            self._channel.confirm_delivery()
        except LOST as error:
            close(self._connection)
            raise translated(error, self._address, f"queue {self._queue}") from error

    def __iter__(self) -> Iterator[DeadLetter]:
        """The letters that are there now; what comes in later (a job that was requeued and failed again) is not met."""
        self._left = 1
        first = True
        while self._left > 0:
            try:
                method, properties, body = self._channel.basic_get(self._queue)
            except LOST as error:
                raise translated(error, self._address, f"queue {self._queue}") from error
            if method is None:
                self._left = 0
                return
            self._left = method.message_count if first else self._left - 1
            first = False
            yield _read(method.delivery_tag, properties, body or b"")

    def requeue(self, letter: DeadLetter) -> None:
        """Publishes the job again to its pool, confirmed and mandatory, and then acks the letter.

        The copy begins with a first attempt and carries the publisher's own headers, and why it was here in
        `x-reeld-requeued-from`. Raises PublishError when the broker did not take it: then the letter stays.
        """
        exchange = f"{self._broker.prefix}.jobs"
        properties = pika.BasicProperties(
            content_type=letter.content_type or "application/json",
            delivery_mode=pika.DeliveryMode.Persistent.value,
            message_id=letter.message_id,
            correlation_id=letter.correlation_id,
            reply_to=letter.reply_to,
            priority=letter.priority,
            timestamp=int(time.time()),
            app_id="reeld",
            headers={**own_headers(letter.headers), REQUEUED_HEADER: _with_reason(letter)},
        )
        try:
            with self._connection.deadline(self._broker.confirm_timeout_seconds, waits_for_alarms=False):
                self._channel.basic_publish(exchange, self._pool, letter.body, properties, mandatory=True)
            self._channel.basic_ack(letter.delivery_tag)
        except pika.exceptions.UnroutableError as error:
            raise UnroutablePublishError(f"{self._address}: exchange {exchange} has no pool {self._pool!r}") from error
        except pika.exceptions.NackError as error:
            raise PublishError(
                f"{self._address}: the pool {self._pool!r} takes no more jobs now (queue full)"
            ) from error
        except LOST as error:
            raise translated(error, self._address, f"exchange {exchange}") from error

    def drop(self, letter: DeadLetter) -> None:
        """Acks the letter: it is gone."""
        try:
            self._channel.basic_ack(letter.delivery_tag)
        except LOST as error:
            raise translated(error, self._address, f"queue {self._queue}") from error

    def close(self) -> None:
        """Gives back, in their order, the letters that were only read."""
        # The broker puts what comes back behind what came back before: only all letters together keep their order.
        with contextlib.suppress(*LOST):
            while self._left > 0 and self._channel.is_open and self._channel.basic_get(self._queue)[0] is not None:
                self._left -= 1
        close(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take_dead_letter(broker: BrokerConfig, pool: str) -> DeadLetter | None:
    """Takes (and acks) the first dead letter of a pool; None when there is none."""
    with DeadLetterQueue(broker, pool) as letters:
        for letter in letters:
            letters.drop(letter)
            return letter
    return None


def _read(delivery_tag: int, properties: Any, body: bytes) -> DeadLetter:
    headers = dict(properties.headers or {})
    message_id = short_text(properties.message_id)
    code, message, died_at = _reason(headers)
    parsed = body if len(body) <= _PARSED_BYTES else b""
    return DeadLetter(
        delivery_tag=delivery_tag,
        body=body,
        headers=headers,
        message_id=message_id,
        correlation_id=short_text(properties.correlation_id),
        reply_to=short_text(properties.reply_to),
        priority=properties.priority,
        content_type=short_text(properties.content_type),
        job_id=_text(headers, "x-reeld-job-id") or salvage_job_id(parsed, message_id),
        code=code,
        message=message,
        path=_text(headers, "x-reeld-path") or None,
        worker_id=_text(headers, "x-reeld-worker"),
        died_at=died_at,
    )


def _reason(headers: dict[str, Any]) -> tuple[str, str, float | None]:
    """Code, message and time: as a worker noted them, or else as the broker did."""
    if (code := _text(headers, "x-reeld-code")) is not None:
        return code, _text(headers, "x-reeld-message") or "", _unix(_text(headers, TIME_HEADER))
    deaths = headers.get("x-death")
    death = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else {}
    reason, at = death.get("reason"), death.get("time")
    died_at = at.timestamp() if isinstance(at, datetime) else None
    if reason == _DELIVERY_LIMIT:
        text = "the broker delivered it too often: each time its worker was lost or handed it back"
        return str(ErrorCode.WORKER_LOST), text, died_at
    if reason == "expired":
        return str(ErrorCode.EXPIRED), "its expiration passed while it was queued", died_at
    return "unknown", f"the broker says: {reason}" if reason else "no reason was noted", died_at


def _with_reason(letter: DeadLetter) -> list[dict[str, Any]]:
    reason = {
        "code": letter.code,
        "message": letter.message[:_REASON_CHARACTERS],
        "path": letter.path or "",
        "worker": letter.worker_id or "",
        "died_at": "" if letter.died_at is None else rfc3339(letter.died_at),
    }
    return [*letter.requeued_from, reason][-_REASONS_KEPT:]


def rfc3339(unix_seconds: float) -> str:
    """In UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_seconds))


def _unix(text: str | None) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp() if text else None
    except ValueError:
        return None


def _text(headers: dict[str, Any], name: str) -> str | None:
    value = headers.get(name)
    return value if isinstance(value, str) else None
