"""The publisher thread: one connection with publisher confirms.

Owns everything that reeld sends. `publish` means confirmed: it returns once the broker has the message, however
long the broker is away, refuses it or is under an alarm; only its caller gives up. `offer` is for what may be lost
(progress, heartbeats). Leaves out what is sent (`daemon.message`, `daemon.reporter`) and consuming (`daemon.consumer`).
"""

import concurrent.futures
import contextlib
import heapq
import itertools
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pika.exceptions
import structlog
from pika.adapters.blocking_connection import BlockingChannel

from daemon.connection import LOST, Connection, backoff_seconds, connect
from daemon.errors import BrokerUnavailableError, FatalError, PublishError
from daemon.measurements import SILENT, Measurements
from daemon.message import Message
from daemon.sections import BrokerConfig

log = structlog.get_logger("publisher")

_ACCESS_REFUSED = 403
_IDLE_SECONDS = 1.0
_WAITING_AT_MOST = 100  # before what is offered
_REJECTED_PASSING = 1  # so often in a row it may be a queue's leader that moves


@dataclass(slots=True)
class _Request:
    message: Message
    done: "concurrent.futures.Future[None]" = field(default_factory=concurrent.futures.Future)
    failures: int = 0
    rejected: int = 0  # by a broker that could have taken it


class Publisher:
    """Publishes over one connection with confirms, from a thread of its own. `status` says how that goes.

    `on_failed` is called in that thread when it ends by a fault of its own; nothing is published any more.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        *,
        worker_id: str,
        on_failed: Callable[[FatalError], None] = lambda _error: None,
        measurements: Measurements = SILENT,
    ) -> None:
        self._broker = broker
        self._on_failed = on_failed
        self._measurements = measurements
        self._connected_before = False
        self._worker_id = worker_id
        self._requests: queue.SimpleQueue[_Request | Message | None] = queue.SimpleQueue()
        self._later: list[tuple[float, int, _Request]] = []  # a heap: when, its number, what
        self._numbers = itertools.count()
        self._connect_at = 0.0
        self._away_since: float | None = None  # since when no connection could be had
        self._connection: Connection | None = None
        self._channel: BlockingChannel | None = None
        self._refused: str | None = None  # the permission that the message at hand lacks
        self._rejected: tuple[_Request, str] | None = None  # what the broker takes back again and again, and why
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._status = "connecting"

    def start(self) -> None:
        self._thread.start()

    @property
    def status(self) -> str:
        connection = self._connection
        blocked = connection.blocked if connection is not None else None
        if self._refused:
            return f"the broker refuses it: {self._refused}"
        if (rejected := self._rejected) and not rejected[0].done.done():
            message = rejected[0].message
            return f"{message.exchange}, {message.routing_key}: {rejected[1]}"
        return f"blocked by the broker: {blocked}" if blocked else self._status

    @property
    def trouble(self) -> str | None:
        """Why what must be published cannot be: refused (a permission is missing), rejected (a queue is full or not
        there), disconnected or blocked (a broker's alarm); or None."""
        connection = self._connection
        if self._refused:
            return "refused"
        if connection is None or self._channel is None:
            return "disconnected"
        if (rejected := self._rejected) and not rejected[0].done.done():
            return "rejected"
        return "blocked" if connection.blocked else None

    def publish(self, message: Message, *, give_up: Callable[[], bool] = lambda: False) -> None:
        """Publishes and waits for the broker's confirm, for as long as that takes.

        Raises PublishError once `give_up()` is true (asked every second); the message may have arrived all the same.
        Raises PublishError at once for what AMQP cannot carry.
        Raises FatalError when the publisher's thread is gone.
        """
        request = _Request(message)
        begun = time.monotonic()
        self._requests.put(request)
        while True:
            try:
                request.done.result(timeout=_IDLE_SECONDS)
            except TimeoutError:
                if not self._thread.is_alive():
                    raise FatalError("the publisher's thread has ended; see its last log line") from None
                status = self.status  # which is another once nobody waits for this
                if give_up() and request.done.cancel():
                    raise PublishError(f"{message.routing_key} not confirmed; {status}") from None
            else:
                self._measurements.published(time.monotonic() - begun)
                return

    def offer(self, message: Message) -> None:
        """Publishes if that can be done soon; drops it when the broker is away or blocks publishers."""
        connection = self._connection
        if self._requests.qsize() < _WAITING_AT_MOST and not (connection is not None and connection.blocked):
            self._requests.put(message)

    def stop(self, *, timeout_seconds: float = 10) -> None:
        """Sends what was offered before, then closes the connection and ends the thread."""
        self._requests.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # the top of this thread: who publishes next sees that it is gone, and raises
            log.critical("publisher_failed", exc_info=True)
            self._status = f"failed: {error!r}"
            self._refused = self._rejected = self._connection = self._channel = None
            self._on_failed(FatalError(f"the publisher's thread failed: {error!r}"))

    def _serve(self) -> None:
        self._ready()  # connected before the first job, so that its first events are not lost
        while True:
            try:
                request = self._next()
            except queue.Empty:
                self._idle()
                continue
            if request is None:
                break
            if isinstance(request, Message):
                self._send_offered(request)
            elif not request.done.cancelled():
                self._send(request)
        self._close()

    def _next(self) -> _Request | Message | None:
        """What to send next. Raises queue.Empty when there is nothing for a while."""
        now = time.monotonic()
        if self._later and self._later[0][0] <= now:
            return heapq.heappop(self._later)[2]
        wait = min(_IDLE_SECONDS, self._later[0][0] - now) if self._later else _IDLE_SECONDS
        return self._requests.get(timeout=wait)

    def _idle(self) -> None:
        """Keeps the connection alive, and opens it ahead of need."""
        if not self._ready() or self._connection is None:
            return
        try:
            self._connection.process_data_events(time_limit=0)
        except LOST as error:
            self._lost(error)

    def _send_offered(self, message: Message) -> None:
        if not self._ready():
            return
        try:
            self._basic_publish(message)
        except (pika.exceptions.UnroutableError, pika.exceptions.NackError):
            pass  # nobody listens: that is what an offer is for
        except LOST as error:
            self._lost(error)
        except Exception:  # not this message's thread alone
            log.exception("unpublishable", exchange=message.exchange, routing_key=message.routing_key)
            self._close()

    def _send(self, request: _Request) -> None:
        """Sends what must be published, or puts it off; others go on meanwhile."""
        message = request.message
        if not self._ready():
            self._put_off(request, max(0.0, self._connect_at - time.monotonic()))
            return
        try:
            waiting = self._count_unrouted(message)
            self._basic_publish(message)
        except pika.exceptions.UnroutableError:
            reason = f"exchange {message.exchange!r} routed it to no queue"
            request.rejected += 1
        except pika.exceptions.NackError:
            reason = "the broker refused it: a queue is full or unavailable"
            request.rejected += 1
        except LOST as error:
            self._lost(error)
            reason = repr(error)
            if isinstance(error, pika.exceptions.ChannelClosedByBroker) and error.reply_code == _ACCESS_REFUSED:
                self._refused = error.reply_text
                fix = "the permissions in docs/brokers.md"
                log.error("publish_refused", reason=error.reply_text, fix=fix)  # noqa: TRY400  the trace says no more
        except Exception as error:  # what AMQP cannot carry; the others shall go on
            log.exception("unpublishable", exchange=message.exchange, routing_key=message.routing_key)
            self._close()  # a part of it may have been sent
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                request.done.set_exception(PublishError(f"{message.routing_key} cannot be published: {error!r}"))
            return
        else:
            self._refused = None
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # its caller has just given up
                request.done.set_result(None)
            self._warn_of_unrouted(message, waiting)
            return
        if request.rejected > _REJECTED_PASSING:
            self._rejected = (request, reason)
        request.failures += 1
        self._measurements.publish_failed()
        delay = self._backoff(request.failures)
        log.warning(
            "publish_failed",
            exchange=message.exchange,
            routing_key=message.routing_key,
            reason=reason,
            retry_in_seconds=round(delay, 2),
        )
        self._put_off(request, delay)

    def _put_off(self, request: _Request, seconds: float) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), request))

    def _basic_publish(self, message: Message) -> None:
        assert self._channel is not None
        assert self._connection is not None
        # pika waits for a confirm without limit.
        with self._connection.deadline(self._broker.confirm_timeout_seconds):
            self._channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                message.properties(),
                mandatory=message.mandatory,
            )

    def _warn_of_unrouted(self, message: Message, waited_before: int | None) -> None:
        """Says so when a message that is confirmed was kept by the alternate exchange."""
        if waited_before is None:
            return
        try:
            waiting = self._count_unrouted(message)
        except LOST as error:  # nothing to publish again for
            self._lost(error)
            return
        if (waiting or 0) > waited_before:
            log.warning("event_unrouted", routing_key=message.routing_key, kept_in=message.alternate_queue)

    def _count_unrouted(self, message: Message) -> int | None:
        """How many messages the alternate exchange keeps. An exchange with an alternate returns nothing, even if
        `mandatory`, so the growth of this number is all that tells."""
        if message.alternate_queue is None or self._connection is None:
            return None
        with self._connection.deadline(self._broker.confirm_timeout_seconds):
            channel = self._connection.channel()
            try:
                count: int = channel.queue_declare(message.alternate_queue, passive=True).method.message_count
            except pika.exceptions.ChannelClosedByBroker as error:
                log.warning("alternate_queue_unknown", queue=message.alternate_queue, reason=error.reply_text)
                return None
            channel.close()
        return count

    def _ready(self) -> bool:
        """Whether there is a channel; tries to open one when it is time."""
        if self._channel is not None:
            return True
        if time.monotonic() < self._connect_at:
            return False
        begun = time.monotonic()
        try:
            connection = connect(self._broker, name=f"reeld {self._worker_id} publisher")
        except (BrokerUnavailableError, FatalError) as error:
            # FatalError too: the consumer decides whether this process should end.
            log.debug("broker_unavailable", reason=str(error))
            self._connect_later(begun, error)
            return False
        self._connection = connection
        try:
            with connection.deadline(self._broker.confirm_timeout_seconds):
                channel = connection.channel()
                channel.confirm_delivery()
        except LOST as error:
            self._lost(error)
            self._connect_later(begun, error)  # a broker that lets us in and refuses us must not be hammered either
            return False
        self._away_since = None
        self._channel = channel
        if self._connected_before:
            self._measurements.reconnected("publisher")
        self._connected_before = True
        self._status = "connected"
        return True

    def _connect_later(self, begun: float, error: Exception) -> None:
        """Backoff for a try that began at `begun` and failed."""
        self._away_since = self._away_since or begun
        now = time.monotonic()
        self._connect_at = now + backoff_seconds(self._broker, waited_seconds=now - self._away_since)
        self._status = f"waiting for the broker: {error}"
        self._refused = None

    def _backoff(self, failures: int) -> float:
        """Exponential, with full jitter: many daemons must not come back at the same moment."""
        ceiling = min(self._broker.backoff_max_seconds, self._broker.backoff_initial_seconds * 2.0 ** min(failures, 30))
        return random.uniform(0, ceiling)

    def _lost(self, error: BaseException) -> None:
        log.warning("connection_lost", reason=repr(error))
        self._status = f"connection lost: {type(error).__name__}"
        self._close()

    def _close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None and connection.is_open:
            with contextlib.suppress(*LOST):
                connection.close()
