"""The consumer thread: one connection that only consumes and acks.

Owns the deliveries' fate (ack, or requeue), reconnecting with backoff, and the daemon's control queue. Leaves out what
a delivery says (`daemon.delivery`), and publishing, which has a connection of its own (`daemon.publisher`): a broker's
memory alarm blocks publishers and must not stop the acks.
"""

import contextlib
import contextvars
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import pika.exceptions
import structlog
from pika.adapters.blocking_connection import BlockingChannel

from daemon.connection import LOST, Connection, connect_with_backoff
from daemon.copies import short_text
from daemon.delivery import Delivery, read_delivery
from daemon.errors import ConfigError, FatalError
from daemon.events import heartbeat_key
from daemon.measurements import SILENT, Measurements
from daemon.sections import BrokerConfig
from daemon.topology import Topology

log = structlog.get_logger("consumer")

_TICK_SECONDS = 1.0


class Consumer:
    """Consumes one pool's job queue. `deliveries` holds what came, oldest first; None: something changed.

    After a lost connection the queue is consumed again only once the deliveries in hand are settled: what they
    carry is redelivered, and each redelivery that is lost again would count towards the queue's delivery limit.
    `prepare(connection)` runs after each connect, before consuming; it may raise ConfigError.
    Until this worker has consumed, in this process or (`served_before`) in one before it, a refusal is final;
    `on_first_consuming` tells when it has.
    `on_heartbeat` gets every heartbeat under this worker's id, its own too; without it none is asked for.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        topology: Topology,
        *,
        worker_id: str,
        prepare: Callable[[Connection], None],
        on_control: Callable[[str], None],
        on_heartbeat: Callable[[bytes], None] | None = None,
        patience_seconds: float = 60.0,
        served_before: bool = False,
        on_first_consuming: Callable[[], None] = lambda: None,
        measurements: Measurements = SILENT,
    ) -> None:
        self._broker = broker
        self._topology = topology
        self._worker_id = worker_id
        self._prepare = prepare
        self._on_control = on_control
        self._on_heartbeat = on_heartbeat
        self._patience = patience_seconds
        self._measurements = measurements
        self._connection: Connection | None = None
        self._channel: BlockingChannel | None = None
        self._generation = 0
        self._in_hand: set[tuple[int, int]] = set()
        self._jobs_tag: str | None = None  # of the job queue's consumer, while the broker may push to it
        self._draining = False
        self._stop = threading.Event()
        self._cancelled_by_broker = False
        self._served_before = served_before
        self._on_first_consuming = on_first_consuming
        self._broken_since: float | None = None
        self._failures = 0
        self.deliveries: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        self.consuming = threading.Event()
        self.status = "connecting"
        self.trouble: str | None = "disconnected"
        """Why no job can come: disconnected, topology (a queue or exchange is missing or differs) or ended; or None."""
        self.fatal: FatalError | None = None
        self._thread = threading.Thread(target=self._run, name="consumer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def in_hand(self) -> int:
        """How many deliveries are taken and not settled."""
        return len(self._in_hand)

    def ack(self, delivery: Delivery) -> None:
        """Acks a delivery whose outcome is durable. On another channel than its own it does nothing."""
        asked_at = time.monotonic()

        def ack(channel: BlockingChannel) -> None:
            channel.basic_ack(delivery.delivery_tag)
            self._measurements.acked(time.monotonic() - asked_at)

        self._settle(delivery, "acked", ack)

    def requeue(self, delivery: Delivery) -> None:
        """Gives a delivery back: it is not the job's fault."""
        self._settle(delivery, "requeued", lambda channel: channel.basic_nack(delivery.delivery_tag, requeue=True))
        self._measurements.job_requeued()

    def drop_if_stale(self, delivery: Delivery) -> bool:
        """Whether the delivery's channel is gone, so that it comes again: then it must not be begun."""
        if delivery.generation == self._generation and self._channel is not None:
            return False
        log.info("stale_delivery", wanted="begun", reason="its channel is gone; the broker redelivers it")
        self._in_hand.discard(delivery.key)
        return True

    def drain(self) -> None:
        """Takes no more jobs. Those in hand are settled as ever. Safe in a signal handler, so it only sets a flag:
        pika's add_callback_threadsafe takes a lock that the interrupted thread may hold."""
        self._draining = True

    def stop(self, *, timeout_seconds: float = 10) -> None:
        """Settles what is pending, closes the connection and ends the thread. Unacked deliveries go back."""
        self._stop.set()
        connection = self._connection
        if connection is not None and connection.is_open:
            with contextlib.suppress(*LOST):
                connection.add_callback_threadsafe(lambda: None)  # ends the wait
        self._thread.join(timeout_seconds)

    def fail(self, error: FatalError) -> None:
        """Has whoever takes the deliveries end with this error. For any thread."""
        self.fatal = error
        self.deliveries.put(None)

    def _settle(self, delivery: Delivery, what: str, settle: Callable[[BlockingChannel], None]) -> None:
        connection = self._connection
        done = threading.Event()

        def on_connection_thread() -> None:
            channel = self._channel
            try:
                if delivery.generation != self._generation or channel is None or not channel.is_open:
                    log.warning("stale_delivery", wanted=what, reason="its channel is gone; the broker redelivers it")
                    return
                if self._draining:
                    self._cancel_jobs(channel)  # first: settling makes room, and the broker would push the next job
                settle(channel)
                log.debug("delivery_settled", how=what, delivery_tag=delivery.delivery_tag)
            except LOST as error:
                log.warning("settle_failed", wanted=what, reason=repr(error))
            finally:
                done.set()

        try:
            if connection is None:
                raise pika.exceptions.ConnectionClosed(0, "no connection")
            context = contextvars.copy_context()  # the job's id belongs in these lines, too
            connection.add_callback_threadsafe(lambda: context.run(on_connection_thread))
            # Bounded: when the connection is lost meanwhile, the broker redelivers and the manifest answers.
            done.wait(timeout=5)
        except LOST as error:
            log.warning("stale_delivery", wanted=what, reason=repr(error))
        finally:
            self._in_hand.discard(delivery.key)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._consume_once()
        except FatalError as error:
            self.fatal = error
        except Exception as error:  # the top of this thread: without it the process would idle for ever
            log.critical("consumer_failed", exc_info=True)
            self.fatal = FatalError(f"the consumer's thread failed: {error!r}")
        finally:
            self.consuming.clear()
            self.status = f"failed: {self.fatal}" if self.fatal else "stopped"
            self.trouble = "ended"
            self.deliveries.put(None)

    def _consume_once(self) -> None:
        connection = connect_with_backoff(
            self._broker,
            name=f"reeld {self._worker_id} consumer",
            on_retry=self._on_retry,
            sleep=self._stop.wait,
            stopped=self._stop.is_set,
            fatal=not self._served_before,
        )
        if connection is None:
            return
        if self._generation > 0:
            self._measurements.reconnected("consumer")
        begun = time.monotonic()
        try:
            self._serve(connection)
        except LOST as error:
            self._broken_since = None  # an outage is no time in which somebody could have mended the topology
            self.status = f"connection lost: {type(error).__name__}"
            self.trouble = "disconnected"
            log.warning("connection_lost", reason=repr(error))
        except ConfigError as error:
            self._on_topology_error(error)
        finally:
            steady_seconds = _TICK_SECONDS if self.consuming.is_set() else self._broker.backoff_max_seconds
            steady = time.monotonic() - begun > steady_seconds
            self.consuming.clear()
            self._connection = None
            self._channel = None
            if connection.is_open:
                with contextlib.suppress(*LOST):
                    connection.close()
        # A broker that accepts connections but refuses the consumer must not be hammered.
        self._failures = 0 if steady else self._failures + 1
        self._stop.wait(min(self._broker.backoff_max_seconds, self._broker.backoff_initial_seconds * self._failures))

    def _serve(self, connection: Connection) -> None:
        """Consumes until told to stop. Raises one of LOST, or ConfigError when the topology is not as planned."""
        self._prepare(connection)
        channel = self._channel = self._open_channel(connection)
        self._connection = connection
        while not self._stop.is_set():
            if self._draining:
                self._cancel_jobs(channel)
                self.status = "connected; consumes no more, as it drains"
                self.trouble = None
            elif not self.consuming.is_set():
                if self._in_hand:
                    self.status = "connected; consumes again once the job in hand is settled"
                    self.trouble = None
                else:
                    self._consume_jobs(channel)
            connection.process_data_events(time_limit=_TICK_SECONDS)
            # process_data_events says nothing of a channel closed by the broker or a cancelled consumer.
            if not channel.is_open:
                raise pika.exceptions.ChannelClosed(0, "channel closed by the broker")
            if self._cancelled_by_broker:
                raise pika.exceptions.ConsumerCancelled
        self._drain_callbacks(connection)
        self._cancel_jobs(channel)

    def _open_channel(self, connection: Connection) -> BlockingChannel:
        self._generation += 1
        self._cancelled_by_broker = False
        self._jobs_tag = None
        channel = connection.channel()
        channel.basic_qos(prefetch_count=self._broker.prefetch_count)
        channel.add_on_cancel_callback(self._on_cancel)
        control = channel.queue_declare("", exclusive=True, auto_delete=True).method.queue
        for key in ("cancel.#", f"drain.{self._worker_id}"):
            channel.queue_bind(control, self._topology.control_exchange, routing_key=key)
        if self._on_heartbeat is not None:
            channel.queue_bind(control, self._topology.status_exchange, routing_key=heartbeat_key(self._worker_id))
        channel.basic_consume(control, self._on_control_message, auto_ack=True)
        return channel

    def _consume_jobs(self, channel: BlockingChannel) -> None:
        try:
            self._jobs_tag = channel.basic_consume(self._topology.jobs_queue, self._on_delivery)
        except pika.exceptions.ChannelClosedByBroker as error:
            raise ConfigError(
                f"queue {self._topology.jobs_queue}: {error.reply_text}; run `reeld topology apply`"
            ) from error
        if not self._served_before:
            self._served_before = True
            self._on_first_consuming()
        self._broken_since = None
        self.status = "consuming"
        self.trouble = None
        self.consuming.set()
        log.info("consuming", queue=self._topology.jobs_queue)

    def _cancel_jobs(self, channel: BlockingChannel) -> None:
        """Ends the job queue's consumer. Each job that the broker pushed to a worker that leaves counts as a delivery
        of it; closing the connection alone would take the next one, and give it back, up to twice."""
        tag, self._jobs_tag = self._jobs_tag, None
        if tag is not None:
            channel.basic_cancel(tag)

    def _on_topology_error(self, error: ConfigError) -> None:
        """Before the first job is consumed this ends the process; later only when nobody mends it for a while.

        Deleting a queue and declaring it anew is ordinary work, and must not stop every daemon for good.
        """
        now = time.monotonic()
        self._broken_since = self._broken_since or now
        if not self._served_before or now - self._broken_since > self._patience:
            raise error
        self.status = f"topology error: {error}"
        self.trouble = "topology"
        log.error("topology_error", reason=str(error), gives_up_in_seconds=self._broken_since + self._patience - now)

    def _on_delivery(self, _channel: BlockingChannel, method: Any, properties: Any, body: bytes) -> None:
        self._in_hand.add((self._generation, method.delivery_tag))
        self.deliveries.put(read_delivery(method, properties, body, generation=self._generation))

    def _on_control_message(self, _channel: BlockingChannel, method: Any, _properties: Any, body: bytes) -> None:
        routing_key = short_text(method.routing_key) or ""
        try:
            if method.exchange == self._topology.control_exchange:
                self._on_control(routing_key)
            elif self._on_heartbeat is not None:
                self._on_heartbeat(body)
        except Exception:  # whoever may publish there reaches every worker: no message may end this thread
            log.exception("control_failed", routing_key=routing_key)

    def _on_cancel(self, _frame: Any) -> None:
        self._cancelled_by_broker = True

    def _drain_callbacks(self, connection: Connection) -> None:
        connection.process_data_events(time_limit=0)
        connection.process_data_events(time_limit=0)

    def _on_retry(self, reason: str, delay_seconds: float) -> None:
        self._broken_since = None
        self.status = f"waiting for the broker: {reason}"
        log.warning("broker_unavailable", reason=reason, retry_in_seconds=round(delay_seconds, 2))
