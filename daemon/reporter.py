"""What the world hears of a job and of the worker: events, dead letters and copies on the retry ladder.

Owns the content of every message that reeld publishes and where it goes. Leaves out how it is published
(`daemon.publisher`) and when (`daemon.coordinator`).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog

from daemon.copies import own_headers
from daemon.delivery import ATTEMPT_HEADER, EXPIRES_HEADER, LOST_HEADER, Delivery
from daemon.errors import ErrorCode, JobError
from daemon.events import CONTENT_TYPE, Event, job_event, now, worker_event
from daemon.job import Job
from daemon.message import Message
from daemon.publisher import Publisher
from daemon.topology import Topology

log = structlog.get_logger("job")

TIME_HEADER = "x-reeld-time"  # on a dead letter: when it became one, RFC 3339
_PROGRESS_INTERVAL_SECONDS = 1.0


class Reporter:
    """Publishes a worker's events, dead letters and retries.

    What must be published is waited for until `give_up()` is true: a job is never given up for a broker's sake.
    """

    def __init__(
        self,
        publisher: Publisher,
        topology: Topology,
        *,
        worker_id: str,
    ) -> None:
        self.give_up: Callable[[], bool] = lambda: False  # the coordinator knows when to stop waiting
        self._publisher = publisher
        self._topology = topology
        self._worker_id = worker_id
        self._progress_at = 0.0
        self._progress_phase: tuple[str, int, str] | None = None

    def job(self, name: str, job: Job, data: dict[str, Any]) -> None:
        """Offers a non-terminal event: it may be lost when the broker is away."""
        event = job_event(
            name,
            job_id=job.job_id,
            worker_id=self._worker_id,
            data={"attempt": job.attempt, "worker_id": self._worker_id, **data},
            traceparent=job.traceparent,
        )
        self._publisher.offer(self._message(event, persistent=False))

    def progress(self, job: Job, data: dict[str, Any]) -> None:
        """Offers a progress event: at most about one a second, and whenever a phase begins."""
        at = time.monotonic()
        phase = (job.job_id, job.attempt, str(data["phase"]))
        if phase != self._progress_phase or at - self._progress_at >= _PROGRESS_INTERVAL_SECONDS:
            self._progress_at, self._progress_phase = at, phase
            self.job("progress", job, data)

    def cancel_noted(self, job_id: str, data: dict[str, Any]) -> None:
        """Offers the answer to a cancel: what this worker knows of the job."""
        event = job_event(
            "cancel_noted", job_id=job_id, worker_id=self._worker_id, data={"worker_id": self._worker_id, **data}
        )
        self._publisher.offer(self._message(event, persistent=False))

    def terminal(self, name: str, job: Job, data: dict[str, Any]) -> None:
        """Publishes a terminal event, mandatory and confirmed, and offers it to `reply_to` where the job has one.

        Raises PublishError when the wait for its confirm was given up: then the job must not be acked.
        """
        event = job_event(
            name,
            job_id=job.job_id,
            worker_id=self._worker_id,
            data={
                "attempt": job.attempt,
                "worker_id": self._worker_id,
                "metadata": job.message.metadata,
                **data,
            },
            # The same job's same end has the same id, so that whoever sees a repeat knows it.
            event_id=f"{job.job_id}:{name}:{job.request_digest[:16]}",
            traceparent=job.traceparent,
        )
        self._publish_terminal(event)
        self._reply(event, reply_to=job.reply_to, correlation_id=job.correlation_id or job.job_id)

    def failed(self, job: Job, delivery: Delivery, error: JobError) -> None:
        """Publishes the dead letter, then the `failed` event. Raises PublishError as `terminal` does."""
        self._dead_letter(delivery, error, job_id=job.job_id)
        self.terminal("failed", job, _failure(error))

    def failed_malformed(self, delivery: Delivery, error: JobError, *, job_id: str | None, digest: str) -> None:
        """The same for a message that is no job; without a job id there is nothing to call it by in an event."""
        self._dead_letter(delivery, error, job_id=job_id)
        if job_id is None:
            return
        event = job_event(
            "failed",
            job_id=job_id,
            worker_id=self._worker_id,
            data={"attempt": 1, "worker_id": self._worker_id, "metadata": {}, **_failure(error)},
            event_id=f"{job_id}:failed:{digest[:16]}",
        )
        self._publish_terminal(event)
        self._reply(event, reply_to=delivery.reply_to, correlation_id=delivery.correlation_id or job_id)

    def retry_later(self, job: Job, delivery: Delivery, error: JobError, *, delay_seconds: int) -> None:
        """Puts a copy on the retry ladder, confirmed and mandatory. Raises PublishError when it is not."""
        self.job(
            "retrying",
            job,
            {"delay_seconds": delay_seconds, "code": str(error.code), "message": error.message},
        )
        headers = {ATTEMPT_HEADER: job.attempt + 1, LOST_HEADER: delivery.lost_count}
        if delivery.expires_at is not None:
            headers[EXPIRES_HEADER] = round(delivery.expires_at * 1000)
        self._publish_copy(
            delivery, exchange="", routing_key=self._topology.retry_queue(delay_seconds), headers=headers
        )

    def worker(self, name: str, data: dict[str, Any]) -> None:
        """Offers a `worker.*` event."""
        event = worker_event(name, worker_id=self._worker_id, data={"worker_id": self._worker_id, **data})
        self._publisher.offer(self._message(event, persistent=False))

    def _publish_terminal(self, event: Event) -> None:
        message = self._message(event, persistent=True, mandatory=True)
        self._publisher.publish(replace(message, alternate_queue=self._topology.unrouted), give_up=self.give_up)

    def _reply(self, event: Event, *, reply_to: str | None, correlation_id: str) -> None:
        """Offers a terminal event to whoever the publisher named. It may be lost: a caller that has gone away, or whose
        queue is full, must not keep the job alive."""
        if reply_to:
            self._publisher.offer(
                Message(
                    exchange="",
                    routing_key=reply_to,
                    body=event.body,
                    content_type=CONTENT_TYPE,
                    type=event.type,
                    message_id=event.event_id,
                    correlation_id=correlation_id,
                )
            )

    def _dead_letter(self, delivery: Delivery, error: JobError, *, job_id: str | None) -> None:
        headers: dict[str, Any] = {
            "x-reeld-code": str(error.code),
            "x-reeld-message": error.message[:2000],
            "x-reeld-path": error.path or "",
            "x-reeld-retryable": error.retryable,
            "x-reeld-worker": self._worker_id,
            TIME_HEADER: now(),
        }
        if job_id is not None:
            headers["x-reeld-job-id"] = job_id
        self._publish_copy(
            delivery, exchange=self._topology.dead_exchange, routing_key=self._topology.pool, headers=headers
        )

    def _publish_copy(self, delivery: Delivery, *, exchange: str, routing_key: str, headers: dict[str, Any]) -> None:
        """Publishes the delivery's message again, mandatory and confirmed, with our headers over its own.

        Not with its `expiration`: that would end the copy's stay on the ladder or among the dead letters.
        """
        self._publisher.publish(
            Message(
                exchange=exchange,
                routing_key=routing_key,
                body=delivery.body,
                mandatory=True,
                content_type=delivery.content_type or "application/json",
                message_id=delivery.message_id,
                correlation_id=delivery.correlation_id,
                reply_to=delivery.reply_to,
                priority=delivery.priority,
                headers={**own_headers(delivery.headers), **headers},
            ),
            give_up=self.give_up,
        )

    def _message(self, event: Event, *, persistent: bool, mandatory: bool = False) -> Message:
        return Message(
            exchange=self._topology.status_exchange,
            routing_key=event.routing_key,
            body=event.body,
            content_type=CONTENT_TYPE,
            type=event.type,
            message_id=event.event_id,
            persistent=persistent,
            mandatory=mandatory,
        )


def _failure(error: JobError) -> dict[str, Any]:
    return {
        "code": str(error.code),
        "message": error.message,
        "path": error.path,
        "retryable": error.retryable or error.code in (ErrorCode.WORKER_LOST,),
    }
