"""The publisher thread: one connection with publisher confirms.

Owns everything that reeld sends. `publish` means confirmed: it returns once the broker has the message, and
tries again, on a new connection, until its deadline. `offer` is for what may be lost (progress, heartbeats).
Leaves out what is sent (`daemon.events`) and consuming (`daemon.consumer`).
"""

import concurrent.futures
import contextlib
import queue
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pika
import pika.exceptions
import structlog
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection

from daemon.config import BrokerConfig
from daemon.connection import LOST, connect_with_backoff
from daemon.errors import FatalError, PublishError, UnroutablePublishError

log = structlog.get_logger("publisher")

_IDLE_SECONDS = 1.0
_OFFERED_AT_MOST = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message to publish."""

    exchange: str
    routing_key: str
    body: bytes
    mandatory: bool = False
    content_type: str = "application/json"
    message_id: str | None = None
    type: str | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    persistent: bool = True
    headers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Request:
    message: Message
    deadline: float
    done: "concurrent.futures.Future[None]"


class Publisher:
    """Publishes over one connection with confirms, from a thread of its own."""

    def __init__(self, broker: BrokerConfig, *, worker_id: str) -> None:
        self._broker = broker
        self._worker_id = worker_id
        self._requests: queue.SimpleQueue[_Request | Message | None] = queue.SimpleQueue()
        self._offered = 0
        self._next_try = 0.0
        self._stop = threading.Event()
        self._connection: BlockingConnection | None = None
        self._channel: BlockingChannel | None = None
        self.fatal: FatalError | None = None
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def publish(self, message: Message, *, timeout_seconds: float) -> None:
        """Publishes and waits for the broker's confirm.

        Raises UnroutablePublishError when a mandatory message reached no queue, PublishError when no confirm
        came within `timeout_seconds`; the message may have arrived all the same.
        """
        request = _Request(message, time.monotonic() + timeout_seconds, concurrent.futures.Future())
        self._requests.put(request)
        try:
            request.done.result(timeout=timeout_seconds + self._broker.confirm_timeout_seconds)
        except concurrent.futures.TimeoutError as error:
            raise PublishError(f"no confirm for {message.routing_key} within {timeout_seconds} s") from error

    def offer(self, message: Message) -> None:
        """Publishes if that can be done soon; drops it when the broker is away or blocks publishers."""
        if self._offered < _OFFERED_AT_MOST:
            self._offered += 1
            self._requests.put(message)

    def stop(self, *, timeout_seconds: float = 10) -> None:
        """Publishes what was asked for, then closes the connection and ends the thread."""
        self._stop.set()
        self._requests.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        self._idle()  # connected before the first job, so that its first events are not lost
        while True:
            try:
                request = self._requests.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                self._idle()
                continue
            if request is None:
                break
            try:
                if isinstance(request, Message):
                    self._offered -= 1
                    self._send_once(request)
                else:
                    self._send_until(request)
            except FatalError as error:
                self.fatal = error
                if isinstance(request, _Request):
                    request.done.set_exception(PublishError(str(error)))
        self._close()

    def _idle(self) -> None:
        """Keeps the connection alive and opens it ahead of need."""
        try:
            if self._connection is None:
                self._connect(give_up_at=time.monotonic() + 1)
            else:
                self._connection.process_data_events(time_limit=0)
        except LOST as error:
            self._lost(error)
        except FatalError as error:
            self.fatal = error

    def _send_once(self, message: Message) -> None:
        if self._channel is None and time.monotonic() >= self._next_try:
            # Offers may come so often that the thread is never idle. The pause keeps a long row of them from
            # standing between a message that must be published and the broker's return.
            self._idle()
            self._next_try = time.monotonic() + _IDLE_SECONDS
        if self._channel is None:
            return
        try:
            self._basic_publish(message)
        except (pika.exceptions.UnroutableError, pika.exceptions.NackError):
            pass  # nobody listens: that is what an offer is for
        except LOST as error:
            self._lost(error)

    def _send_until(self, request: _Request) -> None:
        while True:
            try:
                if self._channel is None and not self._connect(give_up_at=request.deadline):
                    request.done.set_exception(PublishError("the broker cannot be reached"))
                    return
                self._basic_publish(request.message)
            except pika.exceptions.UnroutableError:
                text = f"{request.message.exchange!r} routed {request.message.routing_key!r} to no queue"
                request.done.set_exception(UnroutablePublishError(text))
                return
            except pika.exceptions.NackError:
                request.done.set_exception(PublishError(f"the broker refused {request.message.routing_key!r}"))
                return
            except LOST as error:
                self._lost(error)
                if time.monotonic() >= request.deadline:
                    request.done.set_exception(PublishError(repr(error)))
                    return
            else:
                request.done.set_result(None)
                return

    def _basic_publish(self, message: Message) -> None:
        assert self._channel is not None
        # pika waits for a confirm without limit; past the deadline the socket is shut and the wait ends.
        guard = threading.Timer(self._broker.confirm_timeout_seconds, self._shut_socket, [self._connection])
        guard.daemon = True
        guard.start()
        try:
            self._channel.basic_publish(
                message.exchange,
                message.routing_key,
                message.body,
                pika.BasicProperties(
                    content_type=message.content_type,
                    delivery_mode=2 if message.persistent else 1,
                    message_id=message.message_id,
                    type=message.type,
                    correlation_id=message.correlation_id,
                    reply_to=message.reply_to,
                    app_id="reeld",
                    headers=message.headers or None,
                ),
                mandatory=message.mandatory,
            )
        finally:
            guard.cancel()

    def _connect(self, *, give_up_at: float) -> bool:
        def stopped() -> bool:
            return time.monotonic() >= give_up_at

        connection = connect_with_backoff(
            self._broker,
            name=f"reeld {self._worker_id} publisher",
            on_retry=lambda reason, delay: log.debug("broker_unavailable", reason=reason, retry_in_seconds=delay),
            sleep=lambda seconds: self._stop.wait(min(seconds, max(0.0, give_up_at - time.monotonic()))),
            stopped=stopped,
        )
        if connection is None:
            return False
        self._connection = connection
        self._channel = connection.channel()
        self._channel.confirm_delivery()
        return True

    def _lost(self, error: BaseException) -> None:
        log.warning("connection_lost", reason=repr(error))
        self._close()

    def _close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None and connection.is_open:
            with contextlib.suppress(*LOST):
                connection.close()

    @staticmethod
    def _shut_socket(connection: Any) -> None:
        # pika has no public way to end a wait from outside; the attribute chain is checked by a test.
        sock = getattr(getattr(connection._impl, "_transport", None), "_sock", None)
        if sock is not None:
            log.warning("confirm_overdue", action="dropping the connection")
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
