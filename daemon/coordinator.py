"""Rank 0's job life: from a delivery to its ack.

Owns the order of things: nothing is acked before its outcome is durable (video -> manifest -> confirmed terminal
event -> ack), a finished job is never generated again, and a job that failed for a passing reason is tried again in
place, then over the retry ladder. Leaves out the parts it puts together; they are passed in.
"""

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import tenacity
from structlog.contextvars import bound_contextvars

from daemon.attempt import RankContext, attempt_plan, raise_for_outcomes
from daemon.config import Config
from daemon.consumer import Consumer, Delivery
from daemon.errors import (
    ErrorCode,
    JobCancelled,
    JobError,
    JobHandedBack,
    PermanentJobError,
    PublishError,
    TransientJobError,
)
from daemon.events import now
from daemon.inputs import stage_image
from daemon.job import Job, make_job, parse_job_message, salvage_job_id
from daemon.planning import Draft, draft_plan
from daemon.reporter import ATTEMPT_HEADER, Reporter
from daemon.storage import Storage
from daemon.video import CODEC, encode_video
from parallel.engine import Stop, quantise
from parallel.plan import Generate, GenerationPlan

log = structlog.get_logger("job")


class Coordinator:
    """Serves deliveries one by one until it is told to drain."""

    def __init__(
        self, config: Config, context: RankContext, consumer: Consumer, reporter: Reporter, storage: Storage
    ) -> None:
        self._config = config
        self._context = context
        self._consumer = consumer
        self._reporter = reporter
        self._storage = storage
        self._profiles = {name: model.files.profile for name, model in context.models.items()}
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finisher")
        self._finishing: dict[str, Future[None]] = {}
        self._drain_reason: str | None = None
        self._drain_deadline: float | None = None
        self._hand_back = threading.Event()
        self._cancelled: set[str] = set()

    def drain(self, reason: str) -> None:
        """Finish the job in hand and stop. Asked a second time: hand the job back at once. Safe in a signal handler."""
        if self._drain_reason is not None:
            self._hand_back.set()
        else:
            self._drain_reason = reason
            self._drain_deadline = time.monotonic() + self._config.limits.drain_seconds
        self._consumer.deliveries.put(None)

    def control(self, routing_key: str) -> None:
        """A message on the control exchange. Called by the consumer thread."""
        verb, _, rest = routing_key.partition(".")
        if verb == "cancel":
            self._cancelled.add(rest)
        elif verb == "drain":
            self.drain("control")

    def serve(self) -> str:
        """Serves until drained. Returns the reason. Raises FatalError when the consumer cannot go on."""
        while True:
            self._context.state.set("draining" if self._drain_reason else "idle")
            delivery = self._consumer.deliveries.get() if self._drain_reason is None else None
            if self._consumer.fatal is not None:
                raise self._consumer.fatal
            if delivery is None:
                if self._drain_reason is not None:
                    break
                continue
            if self._drain_reason is not None:
                break  # not begun: closing the connection gives it back
            self._serve_one(delivery)
        log.info("draining", reason=self._drain_reason)
        self._finisher.shutdown(wait=True)
        return self._drain_reason

    def _serve_one(self, delivery: Delivery) -> None:
        limits = self._config.limits
        try:
            message = parse_job_message(delivery.body, max_body_bytes=limits.max_body_bytes)
            job = make_job(
                message,
                message_id=delivery.message_id,
                attempt=_attempt_of(delivery),
                reply_to=delivery.reply_to,
                correlation_id=delivery.correlation_id,
                traceparent=_text_header(delivery, "traceparent"),
            )
        except PermanentJobError as error:
            self._fail_malformed(delivery, error)
            return
        with bound_contextvars(job_id=job.job_id, attempt=job.attempt):
            self._settle(job, delivery, lambda: self._run(job, delivery))

    def _settle(self, job: Job, delivery: Delivery, work: Callable[[], bool]) -> None:
        """Runs `work` and gives its errors their consequence. `work` returns whether the delivery may be acked."""
        try:
            done = work()
        except JobHandedBack:
            log.warning("job_handed_back")
            self._consumer.requeue(delivery)
            return
        except JobCancelled:
            done = self._publish(delivery, lambda: self._reporter.terminal("cancelled", job, {}))
            log.info("job_cancelled")
        except TransientJobError as error:
            done = self._retry_or_fail(job, delivery, error)
        except PermanentJobError as error:
            done = self._fail(job, delivery, error)
        if done:
            self._consumer.ack(delivery)

    def _run(self, job: Job, delivery: Delivery) -> bool:
        earlier = self._finishing.pop(job.job_id, None)
        if earlier is not None:
            earlier.result()  # the same job, still being encoded: its manifest answers this delivery
        if self._answer_from_manifest(job, delivery):
            return True
        if delivery.delivery_count >= self._config.topology.delivery_limit:
            raise PermanentJobError(
                ErrorCode.WORKER_LOST,
                f"{delivery.delivery_count} workers were lost or handed this job back; it is not tried again",
            )
        if job.job_id in self._cancelled:
            raise JobCancelled
        received = time.monotonic()
        log.info("job_accepted", task=job.message.task, redelivered=delivery.redelivered)
        size = self._context.world.world_size
        self._reporter.job("accepted", job, {"ulysses_degree": size, "world_size": size})
        draft = draft_plan(job, self._profiles, self._config.limits, world_size=size)
        plan = self._stage(job, draft)
        staged = time.monotonic()
        try:
            frames = self._generate(job, plan)
        finally:
            shutil.rmtree(self._staging_folder(job), ignore_errors=True)
        generated = time.monotonic()
        timings = {
            "stage_seconds": round(staged - received, 3),
            "generate_seconds": round(generated - staged, 3),
        }
        future = self._finisher.submit(self._finish, job, delivery, draft, plan, frames, timings)
        self._finishing = {key: value for key, value in self._finishing.items() if not value.done()}
        self._finishing[job.job_id] = future
        return False  # acked by its own commit, in the finisher

    def _answer_from_manifest(self, job: Job, delivery: Delivery) -> bool:
        manifest = self._storage.read_manifest(job.job_id)
        if manifest is None:
            return False
        _check_same_request(manifest, job)
        log.info("job_already_done", redelivered=delivery.redelivered)
        return self._publish(
            delivery, lambda: self._reporter.terminal("succeeded", job, {"result": manifest["result"]})
        )

    def _staging_folder(self, job: Job) -> Path:
        return self._config.work_directory / self._config.worker_id / job.job_id

    def _stage(self, job: Job, draft: Draft) -> GenerationPlan:
        if draft.image_uri is None:
            return draft.plan
        self._context.state.set("staging", job_id=job.job_id, phase="stage")
        target = self._staging_folder(job) / "input_image"
        uri = draft.image_uri

        def fetch() -> None:
            try:
                stage_image(uri, target, self._config.inputs, path="inputs.input_image")
            except OSError as error:
                raise TransientJobError(ErrorCode.STORAGE_UNAVAILABLE, f"work directory: {error}") from error

        self._in_place(job, self._config.limits.io_attempts)(fetch)
        return replace(draft.plan, input_image=str(target))

    def _in_place(self, job: Job, attempts: int) -> tenacity.Retrying:
        """Backoff for a transient reason, in the process, with the delivery unacked."""

        def before_sleep(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            delay = state.next_action.sleep if state.next_action else 0.0
            if isinstance(error, JobError):
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
            sleep=self._wait,
            before_sleep=before_sleep,
            reraise=True,
        )

    def _wait(self, seconds: float) -> None:
        self._hand_back.wait(seconds)  # a second SIGTERM ends a backoff as well

    def _generate(self, job: Job, plan: GenerationPlan) -> Any:
        world = self._context.world
        degrees = self._context.models[plan.model].degrees
        self._reporter.job("started", job, {"ulysses_degree": degrees.ulysses_degree, "world_size": degrees.world_size})
        log.info("job_started", height=plan.height, width=plan.width, num_frames=plan.num_frames, seed=plan.seed)
        deadline = time.monotonic() + plan.time_limit_seconds

        def decide() -> Stop:
            if plan.job_id in self._cancelled:
                return Stop.CANCELLED
            if time.monotonic() > deadline:
                return Stop.TIME_LIMIT_EXCEEDED
            overdue = self._drain_deadline is not None and time.monotonic() > self._drain_deadline
            return Stop.HAND_BACK if overdue or self._hand_back.is_set() else Stop.NO

        def attempt() -> Any:
            clock = _StepClock()

            def progress(phase: str, step: int, steps: int) -> None:
                seconds = clock.tick(phase, step)
                eta = None if seconds is None else round(seconds * (steps - step), 3)
                data = {
                    "phase": phase,
                    "step": step,
                    "steps": steps,
                    "seconds_per_step": seconds,
                    "eta_seconds": eta,
                }
                self._reporter.progress(job, data)

            world.broadcast_command(Generate(plan))
            frames, outcomes = attempt_plan(plan, self._context, decide=decide, progress=progress)
            raise_for_outcomes(outcomes or [])
            return frames

        return self._in_place(job, self._config.limits.generate_attempts)(attempt)

    def _finish(
        self,
        job: Job,
        delivery: Delivery,
        draft: Draft,
        plan: GenerationPlan,
        frames: Any,
        timings: dict[str, float],
    ) -> None:
        """Encodes and commits, off the main thread, so that the next job's denoising overlaps it."""
        with bound_contextvars(job_id=job.job_id, attempt=job.attempt):
            try:
                self._settle(job, delivery, lambda: self._commit(job, delivery, draft, plan, frames, timings))
            except Exception:
                # The delivery stays unacked, so the broker redelivers it when this connection ends.
                log.exception("finishing_failed")
                self._consumer.requeue(delivery)

    def _commit(
        self,
        job: Job,
        delivery: Delivery,
        draft: Draft,
        plan: GenerationPlan,
        frames: Any,
        timings: dict[str, float],
    ) -> bool:
        begun = time.monotonic()

        def write() -> dict[str, Any]:
            with self._storage.temporary_video(job.job_id) as temporary:
                count = encode_video(
                    (quantise(frame) for frame in frames),
                    temporary,
                    width=plan.width,
                    height=plan.height,
                    fps=draft.fps,
                    crf=self._config.output.crf,
                )
                stored = self._storage.keep_video(job.job_id, temporary)
            video = {
                "path": str(stored.path),
                "uri": stored.path.as_uri(),
                "sha256": stored.sha256,
                "bytes": stored.bytes,
                "width": plan.width,
                "height": plan.height,
                "num_frames": count,
                "fps": draft.fps,
                "codec": CODEC,
            }
            asked = {
                name: getattr(plan, name)
                for name in (
                    "model",
                    "task",
                    "seed",
                    "height",
                    "width",
                    "num_frames",
                    "num_inference_steps",
                    "cfg_scale",
                    "sigma_shift",
                )
            }
            spent = {**timings, "finish_seconds": round(time.monotonic() - begun, 3)}
            manifest = {
                "schema": "reeld.manifest/1",
                "job_id": job.job_id,
                "request_digest": job.request_digest,
                "finished_at": now(),
                "worker_id": self._config.worker_id,
                "result": {
                    "video": video,
                    "plan": asked,
                    "timings": spent,
                    "manifest": str(self._storage.manifest_path(job.job_id)),
                },
            }
            counted = self._storage.create_manifest(job.job_id, manifest)
            if counted["result"]["video"]["sha256"] != stored.sha256:
                stored.path.unlink(missing_ok=True)  # another daemon was first, with other frames
            return counted

        manifest = self._in_place(job, self._config.limits.io_attempts)(write)
        _check_same_request(manifest, job)
        confirmed = self._publish(
            delivery, lambda: self._reporter.terminal("succeeded", job, {"result": manifest["result"]})
        )
        if confirmed:
            log.info("job_succeeded", video=manifest["result"]["video"]["path"], **manifest["result"]["timings"])
        return confirmed

    def _retry_or_fail(self, job: Job, delivery: Delivery, error: TransientJobError) -> bool:
        ladder = self._config.topology.retry_delays_seconds
        if job.attempt > len(ladder):
            return self._fail(job, delivery, error)
        delay = ladder[job.attempt - 1]
        log.warning("job_retried_later", code=str(error.code), reason=error.message, delay_seconds=delay)
        return self._publish(delivery, lambda: self._reporter.retry_later(job, delivery, error, delay_seconds=delay))

    def _fail(self, job: Job, delivery: Delivery, error: JobError) -> bool:
        log.error("job_failed", code=str(error.code), reason=error.message, path=error.path)
        return self._publish(delivery, lambda: self._reporter.failed(job, delivery, error))

    def _fail_malformed(self, delivery: Delivery, error: PermanentJobError) -> None:
        job_id = salvage_job_id(delivery.body, delivery.message_id)
        log.error("job_malformed", job_id=job_id, code=str(error.code), path=error.path, reason=error.message)
        digest = hashlib.sha256(delivery.body).hexdigest()
        if self._publish(
            delivery, lambda: self._reporter.failed_malformed(delivery, error, job_id=job_id, digest=digest)
        ):
            self._consumer.ack(delivery)

    def _publish(self, delivery: Delivery, publish: Callable[[], None]) -> bool:
        """Whether it was confirmed. If not, the delivery goes back: the redelivery says it again."""
        try:
            publish()
        except PublishError as error:
            log.warning("publish_failed", reason=str(error), consequence="the job is requeued, not acked")
            self._consumer.requeue(delivery)
            return False
        return True


class _StepClock:
    """Seconds a step, over the steps of one attempt so far."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def tick(self, phase: str, step: int) -> float | None:
        now_ = time.monotonic()
        if phase != "denoise" or self._first is None:
            self._first = (step, now_) if phase == "denoise" else None
            return None
        first_step, first_time = self._first
        return round((now_ - first_time) / (step - first_step), 4) if step > first_step else None


def _check_same_request(manifest: dict[str, Any], job: Job) -> None:
    if manifest["request_digest"] != job.request_digest:
        raise PermanentJobError(
            ErrorCode.JOB_ID_CONFLICT, "another request was already made under this job_id", path="job_id"
        )


def _attempt_of(delivery: Delivery) -> int:
    attempt = delivery.headers.get(ATTEMPT_HEADER, 1)
    return attempt if type(attempt) is int and attempt >= 1 else 1


def _text_header(delivery: Delivery, name: str) -> str | None:
    value = delivery.headers.get(name)
    return value if isinstance(value, str) else None
