"""What becomes of a delivery: acked, requeued, put on the retry ladder, or dead-lettered.

Owns the consequence of each class of error, and trying again in place. Nothing is acked before its outcome is
confirmed. Leaves out the work itself (`daemon.coordinator`, `daemon.finisher`) and what is published
(`daemon.reporter`).
"""

import hashlib
from collections.abc import Callable

import structlog
import tenacity

from daemon.cancellations import Cancellations
from daemon.consumer import Consumer
from daemon.delivery import Delivery
from daemon.errors import (
    ErrorCode,
    JobCancelled,
    JobError,
    JobHandedBack,
    PermanentJobError,
    PublishError,
    TransientJobError,
)
from daemon.job import Job, OversizedBodyError, salvage_job_id
from daemon.measurements import SILENT, Measurements
from daemon.reporter import Reporter

log = structlog.get_logger("job")


class Settlement:
    """Settles deliveries. `pause(seconds, job_id)` waits between two tries in place, and raises what ends the job."""

    def __init__(
        self,
        consumer: Consumer,
        reporter: Reporter,
        *,
        retry_delays_seconds: tuple[int, ...],
        pause: Callable[[float, str | None], None],
        cancellations: Cancellations,
        measurements: Measurements = SILENT,
    ) -> None:
        self._consumer = consumer
        self._reporter = reporter
        self._ladder = retry_delays_seconds
        self._pause = pause
        self._cancellations = cancellations
        self._measurements = measurements

    def settle(self, job: Job, delivery: Delivery, work: Callable[[], bool]) -> None:
        """Runs `work` and gives its errors their consequence. `work` returns whether the delivery may be acked."""
        try:
            done = work()
        except JobHandedBack:
            log.warning("job_handed_back")
            self._consumer.requeue(delivery)
            return
        except JobCancelled:
            done = self.publish(delivery, lambda: self._reporter.terminal("cancelled", job, {}))
            log.info("job_cancelled")
            if done:
                self._measurements.job_ended("cancelled", ErrorCode.CANCELLED)
        except TransientJobError as error:
            done = self._retry_or_fail(job, delivery, error)
        except PermanentJobError as error:
            done = self._fail(job, delivery, error)
        if done:
            self._consumer.ack(delivery)

    def fail_malformed(self, delivery: Delivery, error: PermanentJobError) -> None:
        """Settles a message that is no job."""
        body = b"" if isinstance(error, OversizedBodyError) else delivery.body
        job_id = salvage_job_id(body, delivery.message_id)
        log.error("job_malformed", job_id=job_id, code=str(error.code), path=error.path, reason=error.message)
        digest = hashlib.sha256(delivery.body).hexdigest()
        if self.publish(
            delivery, lambda: self._reporter.failed_malformed(delivery, error, job_id=job_id, digest=digest)
        ):
            self._measurements.job_ended("failed", error.code)
            self._consumer.ack(delivery)

    def requeue(self, delivery: Delivery) -> None:
        """Gives a delivery back to the queue."""
        self._consumer.requeue(delivery)

    def publish(self, delivery: Delivery, publish: Callable[[], None]) -> bool:
        """Whether it was confirmed. If not, the delivery goes back: the redelivery says it again."""
        try:
            publish()
        except PublishError as error:
            log.warning("publish_failed", reason=str(error), consequence="the job is requeued, not acked")
            self._consumer.requeue(delivery)
            return False
        return True

    def in_place(self, job: Job, attempts: int, *, cancellable: bool = True) -> tenacity.Retrying:
        """Backoff for a transient reason, in the process, with the delivery unacked.

        Raises JobHandedBack when the daemon must stop meanwhile, JobCancelled when a `cancellable` job is cancelled.
        """

        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            delay = state.next_action.sleep if state.next_action else 0.0
            if isinstance(error, JobError):
                self._measurements.job_retried("in_place", error.code)
                log.warning("retrying_in_place", code=str(error.code), reason=error.message, delay_seconds=delay)
                self._reporter.job(
                    "retrying",
                    job,
                    {"delay_seconds": round(delay, 3), "code": str(error.code), "message": error.message},
                )

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientJobError),
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
            sleep=lambda seconds: self._pause(seconds, job.job_id if cancellable else None),
            before_sleep=before_sleep,
            reraise=True,
        )

    def _retry_or_fail(self, job: Job, delivery: Delivery, error: TransientJobError) -> bool:
        if job.attempt > len(self._ladder):
            return self._fail(job, delivery, error)
        delay = self._ladder[job.attempt - 1]
        log.warning("job_retried_later", code=str(error.code), reason=error.message, delay_seconds=delay)
        done = self.publish(delivery, lambda: self._reporter.retry_later(job, delivery, error, delay_seconds=delay))
        if done:
            self._measurements.job_retried("ladder", error.code)
        return done

    def _fail(self, job: Job, delivery: Delivery, error: JobError) -> bool:
        self._cancellations.forget(job.job_id)  # it came too late: there is one end, and this is it
        log.error("job_failed", code=str(error.code), reason=error.message, path=error.path)
        done = self.publish(delivery, lambda: self._reporter.failed(job, delivery, error))
        if done:
            self._measurements.job_ended("failed", error.code)
        return done
