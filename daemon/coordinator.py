"""Rank 0's job life: which delivery is next, its plan, its generation, and when to stop.

A finished job is never generated again, and a job that failed for a passing reason is tried again in place. Leaves
out the commit (`daemon.finisher`), what becomes of a delivery (`daemon.settlement`), and the parts it puts together,
which are passed in.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, NoReturn

import structlog
from structlog.contextvars import bound_contextvars

from daemon.admission import check_fits
from daemon.asked import DRAINED_BY_MESSAGE, Asked
from daemon.attempt import DivergenceWatch, RankContext, attempt_plan, raise_for_outcomes
from daemon.cancellations import Cancellations
from daemon.config import Config
from daemon.consumer import Consumer
from daemon.delivery import Delivery
from daemon.errors import (
    ErrorCode,
    ExitStatus,
    GroupBrokenError,
    JobCancelled,
    JobError,
    PermanentJobError,
    TransientJobError,
)
from daemon.finisher import Finisher, Generated
from daemon.job import Job, is_job_id, make_job, parse_job_message
from daemon.logs import finish_logs
from daemon.loras import resolve_loras
from daemon.measurements import SILENT, Measurements
from daemon.planning import Draft, draft_plan
from daemon.reporter import Reporter
from daemon.scratch import Scratch
from daemon.settlement import Settlement
from daemon.staging import stage_inputs
from daemon.step_clock import StepClock
from daemon.storage import Storage
from parallel.outcome import Stop
from parallel.plan import Generate, GenerationPlan, Outcome

log = structlog.get_logger("job")

# Lost so often without a pause, a job goes to the retry ladder.
_LOST_RUNNING = 2


class Coordinator:
    """Serves deliveries one by one until it is told to drain."""

    def __init__(
        self,
        config: Config,
        context: RankContext,
        consumer: Consumer,
        reporter: Reporter,
        storage: Storage,
        measurements: Measurements = SILENT,
    ) -> None:
        self._config = config
        self._context = context
        self._consumer = consumer
        self._reporter = reporter
        self._measurements = measurements
        cancelled = Cancellations(
            config.work_directory / f"{config.worker_id}.cancelled.jsonl",
            memory_seconds=config.limits.cancel_memory_seconds,
        )
        self._asked = Asked(cancelled, drain_seconds=config.limits.drain_seconds)
        reporter.give_up = self._asked.must_hand_back
        self._settlement = Settlement(
            consumer,
            reporter,
            retry_delays_seconds=config.topology.retry_delays_seconds,
            pause=self._asked.pause,
            cancellations=cancelled,
            measurements=measurements,
        )
        self._finisher = Finisher(config, context.state, self._settlement, reporter, storage, measurements)
        self._profiles = {name: model.files.profile for name, model in context.models.items()}
        self._scratch = Scratch(config.work_directory)
        self._job_id: str | None = None
        self.on_drain: Callable[[], None] = lambda: None  # asked to drain by a message; called by the consumer thread
        self._answers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")

    @property
    def drain_reason(self) -> str | None:
        """Who asked to drain: a signal's name, or `control`; None while nobody did."""
        return self._asked.drain_reason

    def drain(self, reason: str) -> None:
        """Finish the job in hand and stop. A second signal: hand the job back at once. Safe in a signal handler."""
        self._consumer.drain()
        self._asked.drain(reason)
        self._consumer.deliveries.put(None)
        self._answer_drain()

    def control(self, routing_key: str) -> None:
        """A message on the control exchange. Called by the consumer thread."""
        verb, _, rest = routing_key.partition(".")
        if verb == "cancel":
            self._cancel(rest)
        elif verb == "drain":
            self.on_drain()
            self.drain(DRAINED_BY_MESSAGE)

    def _cancel(self, job_id: str) -> None:
        if not is_job_id(job_id):
            log.warning("cancel_ignored", job_id=job_id[:200], reason="no job can have this id")
            return
        # What runs is asked before it can hear of the cancel.
        running, finishing = self._job_id == job_id, self._finisher.has(job_id)
        kept = self._asked.cancel(job_id)
        # On a thread of its own: it waits for the disk and reads the storage, and the consumer's must do neither.
        self._answers.submit(self._answer_cancel, job_id, kept, running=running, finishing=finishing)

    def _answer_cancel(self, job_id: str, kept: Future[None], *, running: bool, finishing: bool) -> None:
        kept.result()  # the answer says how long it is remembered, over restarts
        state = "running" if running else "finishing" if finishing else "unknown"
        with contextlib.suppress(JobError):  # the storage is away
            if self._finisher.has_manifest(job_id):
                state = "succeeded"
        log.info("cancel_noted", job_id=job_id, state=state)
        self._reporter.cancel_noted(
            job_id, {"state": state, "remembered_seconds": self._config.limits.cancel_memory_seconds}
        )

    def _answer_drain(self) -> None:
        self._reporter.worker("draining", {"reason": self._asked.drain_reason, "job_id": self._job_id})

    def serve(self) -> str:
        """Serves until drained. Returns the reason. Raises FatalError when the consumer cannot go on."""
        while True:
            self._context.state.set("draining" if self._asked.drain_reason else "idle")
            delivery = self._consumer.deliveries.get() if self._asked.drain_reason is None else None
            if self._consumer.fatal is not None:
                # Video, manifest and event need no consumer, and they answer the redelivery.
                self._finisher.wait_for_all(timeout_seconds=self._config.limits.outcome_grace_seconds)
                raise self._consumer.fatal
            if delivery is None:
                if self._asked.drain_reason is not None:
                    break
                continue
            if self._asked.drain_reason is not None:
                break  # not begun: closing the connection gives it back
            if self._consumer.drop_if_stale(delivery):
                continue
            self._serve_one(delivery)
        log.info("draining", reason=self._asked.drain_reason)
        self._finisher.close()
        return self._asked.drain_reason

    def _serve_one(self, delivery: Delivery) -> None:
        limits = self._config.limits
        try:
            message = parse_job_message(delivery.body, max_body_bytes=limits.max_body_bytes)
            job = make_job(
                message,
                message_id=delivery.message_id,
                attempt=delivery.attempt,
                reply_to=delivery.reply_to,
                correlation_id=delivery.correlation_id,
                traceparent=delivery.traceparent,
            )
        except PermanentJobError as error:
            self._settlement.fail_malformed(delivery, error)
            return
        with bound_contextvars(job_id=job.job_id, attempt=job.attempt):
            try:
                self._settlement.settle(job, delivery, lambda: self._run_to_settling(job, delivery))
            except GroupBrokenError as broken:
                self._settle_broken(job, delivery, broken.outcomes)
                raise

    def _run_to_settling(self, job: Job, delivery: Delivery) -> bool:
        self._job_id = job.job_id
        try:
            return self._run(job, delivery)
        finally:
            self._job_id = None
            # What follows may wait for the broker, which is no stall.
            self._context.state.set("settling", job_id=job.job_id)

    def _settle_broken(self, job: Job, delivery: Delivery, outcomes: Sequence[Outcome]) -> None:
        """What a broken group's ranks did report decides for the job; with no failure among it, the job comes back."""

        def verdict() -> bool:
            raise_for_outcomes(outcomes, world_size=self._context.world.world_size)
            return False

        self._settlement.settle(job, delivery, verdict)
        self._finisher.wait_for_all(timeout_seconds=self._config.limits.outcome_grace_seconds)

    def _end_diverged(self, job: Job, delivery: Delivery, outcomes: list[Outcome]) -> NoReturn:
        """Called by the divergence watch: the main thread hangs in a collective that a failed rank has left."""
        self._context.state.set("settling", job_id=job.job_id)
        with bound_contextvars(job_id=job.job_id, attempt=job.attempt):
            failed = {outcome.rank: f"{outcome.code}: {outcome.message}" for outcome in outcomes if not outcome.ok}
            log.critical("ranks_diverged", failed=failed, silent=self._context.world.world_size - len(outcomes))
            try:
                self._settle_broken(job, delivery, outcomes)
            except Exception:
                log.exception("settling_failed")  # unacked, so it comes back
            finally:
                finish_logs()
                os._exit(ExitStatus.GROUP_BROKEN)

    def _run(self, job: Job, delivery: Delivery) -> bool:
        self._context.state.set("settling", job_id=job.job_id)
        self._finisher.wait_for(job.job_id)
        answered = self._finisher.answer_from_manifest(job, delivery)
        if answered is not None:
            return answered
        if job.job_id in self._asked.cancelled:
            raise JobCancelled
        if delivery.expires_at is not None and time.time() >= delivery.expires_at:
            raise PermanentJobError(ErrorCode.EXPIRED, "its expiration passed before it could be begun")
        self._check_not_deadly(delivery)
        received = time.monotonic()
        log.info("job_accepted", task=job.message.task, redelivered=delivery.redelivered)
        published_at = None if delivery.redelivered else delivery.published_at
        self._measurements.job_accepted(
            queue_wait_seconds=None if published_at is None else time.time() - published_at,
            redelivered=delivery.redelivered,
        )
        self._reporter.job("accepted", job, {})
        draft = draft_plan(job, self._profiles, self._config.limits)
        model = self._context.models[draft.plan.model]
        if job.message.loras:
            self._context.state.set("staging", job_id=job.job_id, phase="stage")
        loras = resolve_loras(job.message.loras, self._config.loras, model.loras.shapes)
        try:
            plan = self._split(replace(self._stage(job, draft), loras=loras))
            staged = time.monotonic()
            self._measurements.phase("stage", staged - received)
            frames, phases = self._generate(job, delivery, plan)
        finally:
            self._scratch.close()
        generated = time.monotonic()
        timings = {
            "stage_seconds": round(staged - received, 3),
            "generate_seconds": round(generated - staged, 3),
            **{f"{phase}_seconds": seconds for phase, seconds in phases.items()},
        }
        self._finisher.submit(
            Generated(
                job=job,
                delivery=delivery,
                draft=draft,
                plan=plan,
                frames=frames,
                timings=timings,
                accepted_at=received,
            )
        )
        return False  # acked by its own commit, in the finisher

    def _check_not_deadly(self, delivery: Delivery) -> None:
        """Raises PermanentJobError for a job that was lost with its worker too often, TransientJobError for one that
        was lost twice running: a broker gives it back before all others, which shall have a turn meanwhile."""
        lost = delivery.lost_count
        text = f"{lost} workers were lost with this job or handed it back"
        if lost >= self._config.topology.delivery_limit:
            raise PermanentJobError(ErrorCode.WORKER_LOST, f"{text}; it is not tried again")
        if delivery.delivery_count >= _LOST_RUNNING:
            raise TransientJobError(ErrorCode.WORKER_LOST, f"{text}; others have a turn first")

    def _stage(self, job: Job, draft: Draft) -> GenerationPlan:
        if not draft.input_uris:
            return draft.plan

        def begin() -> None:
            self._context.state.set("staging", job_id=job.job_id, phase="stage")

        def stage() -> GenerationPlan:
            try:
                return stage_inputs(draft, self._scratch.folder() / job.job_id, self._config.inputs, begin=begin)
            except OSError as error:
                raise TransientJobError(ErrorCode.STORAGE_UNAVAILABLE, f"work directory: {error}") from error

        plan: GenerationPlan = self._settlement.in_place(job, self._config.limits.io_attempts)(stage)
        return plan

    def _split(self, plan: GenerationPlan) -> GenerationPlan:
        """The plan with its degrees: how the ranks share this job."""
        model = self._context.models[plan.model]
        degrees = model.degrees_for(plan, self._context.world, self._config.parallel.pinned())
        split = replace(plan, **asdict(degrees), tiled=self._config.parallel.vae == "tiled")
        capacity = self._context.world.memory_capacity_bytes
        if self._config.memory_limit_gib is not None:
            capacity = int(self._config.memory_limit_gib * 2**30)
        if capacity is not None:
            sizes = {name: each.sizes for name, each in self._context.models.items()}
            check_fits(split, sizes, self._config, capacity_bytes=capacity)
        return split

    def _generate(self, job: Job, delivery: Delivery, plan: GenerationPlan) -> tuple[Any, dict[str, float]]:
        """The frames, and how many seconds each phase of the attempt that made them took."""
        world = self._context.world
        degrees = {name: getattr(plan, name) for name in ("cfg_degree", "ulysses_degree", "ring_degree")}
        self._reporter.job("started", job, {**degrees, "world_size": world.world_size})
        shape = {name: getattr(plan, name) for name in ("height", "width", "num_frames", "seed")}
        log.info("job_started", **shape, **degrees)
        deadline = time.monotonic() + plan.time_limit_seconds

        def decide() -> Stop:
            stop = self._asked.stop(plan.job_id)
            if stop is not Stop.CANCELLED and time.monotonic() > deadline:
                return Stop.TIME_LIMIT_EXCEEDED
            return stop

        def attempt() -> tuple[Any, dict[str, float]]:
            clock = StepClock(self._measurements)

            def progress(phase: str, step: int, steps: int) -> None:
                self._reporter.progress(job, clock.tick(phase, step, steps))

            self._context.state.set("generating", phase="encode", job_id=job.job_id)
            with DivergenceWatch(self._context, lambda outcomes: self._end_diverged(job, delivery, outcomes)):
                world.broadcast_command(Generate(plan))
                frames, outcomes = attempt_plan(plan, self._context, decide=decide, progress=progress)
            clock.finish()
            raise_for_outcomes(outcomes or [], world_size=world.world_size)
            return frames, clock.phase_seconds

        made: tuple[Any, dict[str, float]] = self._settlement.in_place(job, self._config.limits.generate_attempts)(
            attempt
        )
        return made
