"""The two ends of a storm: who publishes the jobs, and who hears what becomes of them.

Both talk to the broker directly, not through the proxy, and outlive its restarts; both record what they do and hear.
Leaves out which jobs there are (`tests.storm.schedule`).
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pika
import pika.exceptions

from daemon.errors import PermanentJobError
from daemon.job import parse_job_message, request_digest
from tests.amqp_properties import Properties, nested, table
from tests.history import CancelAsked, Heard, Published, Recorder, VideoSeen, sha256_of, sha256_of_file
from tests.storm.schedule import StormJob

EVENTS_QUEUE = "storm.events"
TERMINAL = ("succeeded", "failed", "cancelled")
_LOST = (pika.exceptions.AMQPError, OSError)


def declare_events_queue(url: str) -> None:
    """A durable queue that hears everything from now on, whoever consumes it."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        channel.queue_declare(EVENTS_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_bind(EVENTS_QUEUE, "reeld.status", "#")


class _Thread:
    """A thread whose failure is kept for whoever asks."""

    def __init__(self, run: Callable[[], None], name: str) -> None:
        self.failure: BaseException | None = None
        self._run = run
        self._thread = threading.Thread(target=self._guarded, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_seconds: float) -> None:
        self._thread.join(timeout_seconds)
        assert not self._thread.is_alive(), f"{self._thread.name} does not end"

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001  the storm's main thread raises it
            self.failure = error


class Listener:
    """Hears every event, records those of jobs, and hashes each video when its success is told."""

    def __init__(self, url: str, recorder: Recorder, on_event: Callable[[str, str, dict[str, Any]], None]) -> None:
        self._url, self._recorder, self._on_event = url, recorder, on_event
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._ended: dict[str, set[str]] = {}
        self.started: list[tuple[float, str]] = []  # when a job was started, and by which daemon
        self.thread = _Thread(self._run, "listener")

    def ended(self) -> int:
        """How many different jobs have had a terminal event."""
        with self._lock:
            return len(self._ended)

    def has_ended(self, job_id: str) -> bool:
        with self._lock:
            return job_id in self._ended

    def stop(self) -> None:
        self._stop.set()
        self.thread.join(30)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with contextlib.closing(pika.BlockingConnection(pika.URLParameters(self._url))) as connection:
                    channel = connection.channel()
                    channel.basic_qos(prefetch_count=100)
                    for method, _, body in channel.consume(EVENTS_QUEUE, inactivity_timeout=0.5):
                        if method is not None:
                            self._hear(method.routing_key, body)
                            channel.basic_ack(method.delivery_tag)
                        if self._stop.is_set() and method is None:
                            break
            except _LOST:
                self._stop.wait(0.3)

    def _hear(self, routing_key: str, body: bytes) -> None:
        kind, _, rest = routing_key.partition(".")
        if kind != "job":
            return
        job_id, _, name = rest.rpartition(".")
        event = json.loads(body)
        if name == "started":
            self.started.append((time.monotonic(), event["data"]["worker_id"]))
        terminal = name in TERMINAL
        self._recorder.add(Heard(job_id=job_id, name=name, event=event if terminal else {}))
        if name == "succeeded":
            path = event["data"]["result"]["video"]["path"]
            self._recorder.add(VideoSeen(path=path, sha256=sha256_of_file(Path(path))))
        if terminal:
            with self._lock:
                self._ended.setdefault(job_id, set()).add(name)
        self._on_event(job_id, name, event)


class Publisher:
    """Publishes a storm's jobs, a few ahead of the daemons, each until it is confirmed; and cancels."""

    def __init__(
        self, url: str, recorder: Recorder, jobs: tuple[StormJob, ...], *, ahead: int, ended: Callable[[], int]
    ) -> None:
        self._url, self._recorder, self._jobs, self._ahead, self._ended = url, recorder, jobs, ahead, ended
        self._cancels: list[str] = []
        self._wake = threading.Event()
        self._stop = False
        self._kinds = {job.job_id: job.kind for job in jobs}
        self._connection: pika.BlockingConnection | None = None
        self._channel: Any = None
        self._enough = False
        self._up_to = len(jobs)
        self.published: list[StormJob] = []
        self.done = threading.Event()  # all jobs are published
        self.cancels = 0
        self.thread = _Thread(self._run, "publisher")

    def cancel(self, job_id: str) -> None:
        """Cancels a job soon. From any thread."""
        self._cancels.append(job_id)
        self._wake.set()

    def on_event(self, job_id: str, name: str, _event: dict[str, Any]) -> None:
        """Cancels what is to be cancelled at this event."""
        kind = self._kinds.get(job_id)
        if (kind, name) == ("cancelled while running", "started") or (
            kind == "cancelled when done" and name in TERMINAL
        ):
            self.cancel(job_id)
        self._wake.set()

    def allow(self, jobs: int) -> None:
        """Publishes so many jobs, and no further one before more are allowed."""
        self._up_to = jobs
        self._wake.set()

    def waiting(self) -> int:
        """How many jobs with an id are published and have not ended."""
        return sum(job.job_id is not None for job in self.published) - self._ended()

    def finish(self) -> None:
        """No further job; cancels still go out."""
        self._enough = True
        self._wake.set()

    def stop(self) -> None:
        self._stop = True
        self._wake.set()
        self.thread.join(60)

    def _run(self) -> None:
        silent = 0
        for number, job in enumerate(self._jobs):
            while not (self._stop or self._enough) and (
                number >= self._up_to or number - silent - self._ended() >= self._ahead
            ):
                self._serve_cancels()
            if self._stop or self._enough:
                break
            for body, message_id in job.messages:
                self._publish(job, body, message_id)
            self.published.append(job)
            silent += job.job_id is None  # nobody hears of it
            if job.kind == "cancelled while queued":
                self.cancel(job.job_id or "")
        self.done.set()
        while not self._stop:
            self._serve_cancels()
        self._disconnect()

    def _serve_cancels(self) -> None:
        self._wake.wait(0.5)
        self._wake.clear()
        while self._cancels:
            job_id = self._cancels.pop(0)
            self._recorder.add(CancelAsked(job_id=job_id))
            self._send("reeld.control", f"cancel.{job_id}", b"", None, mandatory=False)
            self.cancels += 1

    def _publish(self, job: StormJob, body: bytes, message_id: str | None) -> None:
        record = Published(
            job_id=job.job_id, body=sha256_of(body), message_id=message_id, digest=digest_of(body), confirmed=False
        )
        while not self._stop:
            odd = _odd_properties(message_id) if job.kind == "odd properties" else None
            if self._send("reeld.jobs", "test", body, message_id, mandatory=True, properties=odd):
                self._recorder.add(
                    Published(
                        job_id=job.job_id, body=record.body, message_id=message_id, digest=record.digest, confirmed=True
                    )
                )
                return
            self._recorder.add(record)  # it may have arrived

    def _send(
        self,
        exchange: str,
        key: str,
        body: bytes,
        message_id: str | None,
        *,
        mandatory: bool,
        properties: pika.BasicProperties | None = None,
    ) -> bool:
        properties = properties or pika.BasicProperties(
            delivery_mode=2, content_type="application/json", message_id=message_id
        )
        try:
            if self._channel is None:
                parameters = pika.URLParameters(self._url)
                parameters.blocked_connection_timeout = 60
                self._connection = pika.BlockingConnection(parameters)
                self._channel = self._connection.channel()
                self._channel.confirm_delivery()
            self._channel.basic_publish(exchange, key, body, properties, mandatory=mandatory)
        except _LOST:
            self._disconnect()
            time.sleep(0.3)  # a broker that is down has no event to wait for
            return False
        return True

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(*_LOST):
                self._connection.close()
        self._connection = self._channel = None


def _odd_properties(message_id: str | None) -> pika.BasicProperties:
    """What AMQP carries and pika 1.4 chokes on: a date of no calendar, deep nesting, names that are no text."""
    headers = {b"late": b"T" + b"\x7f" * 8, b"deep": nested(2000, arrays=True), b"\xff": b"V"}
    strings = {"message_id": (message_id or "").encode(), "correlation_id": b"\xff", "content_type": b"\xff"}
    return Properties(strings=strings, headers=table(headers)).for_pika()


def digest_of(body: bytes) -> str | None:
    """The digest of a body's request; None for what is no job."""
    try:
        return request_digest(parse_job_message(body, max_body_bytes=1 << 20))
    except PermanentJobError:
        return None
