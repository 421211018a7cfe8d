"""Rank 0's job life: which delivery is next, its plan, its generation, and when to stop.

A finished job is never generated again, and a job that failed for a passing reason is tried again in place. Leaves
out the commit (`daemon.finisher`), what becomes of a delivery (`daemon.settlement`), and the parts it puts together,
which are passed in.
"""

import threading
import time
from dataclasses import asdict, replace
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars

from daemon.attempt import RankContext, attempt_plan, raise_for_outcomes
from daemon.config import Config
from daemon.consumer import Consumer, Delivery
from daemon.errors import ErrorCode, JobCancelled, PermanentJobError, TransientJobError
from daemon.finisher import Finisher, Generated
from daemon.job import Job, make_job, parse_job_message
from daemon.loras import resolve_loras
from daemon.planning import Draft, draft_plan
from daemon.reporter import ATTEMPT_HEADER, Reporter
from daemon.scratch import Scratch
from daemon.settlement import Settlement
from daemon.staging import stage_inputs
from daemon.storage import Storage
from parallel.outcome import Stop
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
        reporter.give_up = self._must_let_go
        self._settlement = Settlement(
            consumer, reporter, retry_delays_seconds=config.topology.retry_delays_seconds, wait=self._wait
        )
        self._finisher = Finisher(config, context.state, self._settlement, reporter, storage)
        self._profiles = {name: model.files.profile for name, model in context.models.items()}
        self._scratch = Scratch(config.work_directory)
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
            if self._consumer.drop_if_stale(delivery):
                continue
            self._serve_one(delivery)
        log.info("draining", reason=self._drain_reason)
        self._finisher.close()
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
            self._settlement.fail_malformed(delivery, error)
            return
        with bound_contextvars(job_id=job.job_id, attempt=job.attempt):
            self._settlement.settle(job, delivery, lambda: self._run_to_settling(job, delivery))

    def _run_to_settling(self, job: Job, delivery: Delivery) -> bool:
        try:
            return self._run(job, delivery)
        finally:
            # What follows may wait for the broker, which is no stall.
            self._context.state.set("settling", job_id=job.job_id)

    def _run(self, job: Job, delivery: Delivery) -> bool:
        self._context.state.set("settling", job_id=job.job_id)
        self._finisher.wait_for(job.job_id)
        if self._finisher.answer_from_manifest(job, delivery):
            return True
        if delivery.delivery_count >= self._config.topology.delivery_limit:
            raise PermanentJobError(
                ErrorCode.WORKER_LOST,
                f"{delivery.delivery_count} workers were lost or handed this job back; it is not tried again",
            )
        if job.job_id in self._cancelled:
            raise JobCancelled
        if delivery.expires_at is not None and time.time() >= delivery.expires_at:
            raise PermanentJobError(ErrorCode.EXPIRED, "its expiration passed before it could be begun")
        received = time.monotonic()
        log.info("job_accepted", task=job.message.task, redelivered=delivery.redelivered)
        self._reporter.job("accepted", job, {})
        draft = draft_plan(job, self._profiles, self._config.limits)
        model = self._context.models[draft.plan.model]
        loras = resolve_loras(job.message.loras, self._config.loras, model.loras.shapes)
        try:
            plan = self._split(replace(self._stage(job, draft), loras=loras))
            staged = time.monotonic()
            frames = self._generate(job, plan)
        finally:
            self._scratch.close()
        generated = time.monotonic()
        timings = {
            "stage_seconds": round(staged - received, 3),
            "generate_seconds": round(generated - staged, 3),
        }
        self._finisher.submit(
            Generated(job=job, delivery=delivery, draft=draft, plan=plan, frames=frames, timings=timings)
        )
        return False  # acked by its own commit, in the finisher

    def _stage(self, job: Job, draft: Draft) -> GenerationPlan:
        if not draft.input_uris:
            return draft.plan

        def stage() -> GenerationPlan:
            self._context.state.set("staging", job_id=job.job_id, phase="stage")
            try:
                return stage_inputs(draft, self._scratch.folder() / job.job_id, self._config.inputs)
            except OSError as error:
                raise TransientJobError(ErrorCode.STORAGE_UNAVAILABLE, f"work directory: {error}") from error

        plan: GenerationPlan = self._settlement.in_place(job, self._config.limits.io_attempts)(stage)
        return plan

    def _must_let_go(self) -> bool:
        """Whether the drain takes too long, or somebody asked a second time: what is not done goes back."""
        overdue = self._drain_deadline is not None and time.monotonic() > self._drain_deadline
        return overdue or self._hand_back.is_set()

    def _split(self, plan: GenerationPlan) -> GenerationPlan:
        """The plan with its degrees: how the ranks share this job."""
        model = self._context.models[plan.model]
        degrees = model.degrees_for(plan, self._context.world, self._config.parallel.pinned())
        return replace(plan, **asdict(degrees), tiled=self._config.parallel.vae == "tiled")

    def _wait(self, seconds: float) -> None:
        self._hand_back.wait(seconds)  # a second SIGTERM ends a backoff as well

    def _generate(self, job: Job, plan: GenerationPlan) -> Any:
        world = self._context.world
        degrees = {name: getattr(plan, name) for name in ("cfg_degree", "ulysses_degree", "ring_degree")}
        self._reporter.job("started", job, {**degrees, "world_size": world.world_size})
        shape = {name: getattr(plan, name) for name in ("height", "width", "num_frames", "seed")}
        log.info("job_started", **shape, **degrees)
        deadline = time.monotonic() + plan.time_limit_seconds

        def decide() -> Stop:
            if plan.job_id in self._cancelled:
                return Stop.CANCELLED
            if time.monotonic() > deadline:
                return Stop.TIME_LIMIT_EXCEEDED
            return Stop.HAND_BACK if self._must_let_go() else Stop.NO

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

            self._context.state.set("generating", phase="encode", job_id=job.job_id)
            world.broadcast_command(Generate(plan))
            frames, outcomes = attempt_plan(plan, self._context, decide=decide, progress=progress)
            raise_for_outcomes(outcomes or [])
            return frames

        return self._settlement.in_place(job, self._config.limits.generate_attempts)(attempt)


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


def _attempt_of(delivery: Delivery) -> int:
    attempt = delivery.headers.get(ATTEMPT_HEADER, 1)
    return attempt if type(attempt) is int and attempt >= 1 else 1


def _text_header(delivery: Delivery, name: str) -> str | None:
    value = delivery.headers.get(name)
    return value if isinstance(value, str) else None
