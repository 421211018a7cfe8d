"""One attempt to generate a plan, on one rank, and what the ranks agree on afterwards.

Owns turning a raised error into an outcome, waiting for the others' outcomes, and the verdict. Leaves out
what the verdict means for the job (`daemon.coordinator`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from daemon.errors import (
    ErrorCode,
    GroupBrokenError,
    JobCancelled,
    JobHandedBack,
    PermanentJobError,
    TransientJobError,
)
from daemon.health import RankState
from parallel.engine import generate_frames, release_memory
from parallel.model import LoadedModel
from parallel.outcome import Stop, outcome_of
from parallel.plan import GenerationPlan, Outcome
from parallel.world import OutcomesMissingError, World

log = structlog.get_logger("generate")


@dataclass(frozen=True, slots=True)
class RankContext:
    """What a rank needs for every job."""

    world: World
    models: Mapping[str, LoadedModel]
    state: RankState
    outcome_grace_seconds: float


def attempt_plan(
    plan: GenerationPlan,
    context: RankContext,
    *,
    decide: Callable[[], Stop],
    progress: Callable[[str, int, int], None],
) -> tuple[Any, list[Outcome] | None]:
    """Called by every rank, after the command. Returns the frames and the outcomes of all ranks.

    Rank 0 always gathers. A peer gathers only when its own part failed: when it went well there is nothing to
    wait for but the next command. Raises GroupBrokenError when some rank does not report within the grace.
    """

    work = f"{plan.model} {plan.width}x{plan.height}x{plan.num_frames}"

    def on_progress(phase: str, step: int, steps: int) -> None:
        context.state.set("generating", phase=phase, work=work, job_id=plan.job_id, step=step, steps=steps)
        progress(phase, step, steps)

    frames, error = None, None
    try:
        frames = generate_frames(plan, context.models[plan.model], context.world, progress=on_progress, decide=decide)
    except Exception as caught:  # noqa: BLE001  whatever the attempt raised becomes this rank's outcome
        error = caught
    outcome = outcome_of(error, context.world.rank)
    if outcome.code in ("internal", "out_of_memory", "non_finite", "diverged"):
        log.error("attempt_failed", code=outcome.code, message=outcome.message, exc_info=error)
    context.state.set("agreeing", job_id=plan.job_id)
    context.world.report_outcome(outcome)
    if error is not None:
        del error
        release_memory(context.world.device)
    if outcome.ok and context.world.rank != 0:
        return None, None
    try:
        outcomes = context.world.gather_outcomes(grace_seconds=context.outcome_grace_seconds)
    except OutcomesMissingError as missing:
        raise GroupBrokenError(
            f"{missing} within {context.outcome_grace_seconds} s; this rank: {outcome.code or 'ok'}"
        ) from missing
    return frames, outcomes


def raise_for_outcomes(outcomes: list[Outcome]) -> None:
    """Raises what the ranks' outcomes mean for the job; nothing when all went well."""
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if not failed:
        return
    # A rank that could not go on because of another one's error says `internal`; the cause says more.
    first = next((outcome for outcome in failed if outcome.code != "internal"), failed[0])
    text = f"rank {first.rank}: {first.message}" if len(outcomes) > 1 else first.message
    match first.code:
        case "cancelled":
            raise JobCancelled
        case "hand_back":
            raise JobHandedBack
        case "time_limit_exceeded":
            raise PermanentJobError(ErrorCode.TIME_LIMIT_EXCEEDED, "the time limit ran out", path="time_limit_seconds")
        case "out_of_memory":
            raise PermanentJobError(ErrorCode.OUT_OF_MEMORY, text, path="parameters")
        case "input_rejected":
            raise PermanentJobError(ErrorCode.INPUT_REJECTED, text, path="loras")
        case "non_finite":
            # The same numbers would come again.
            raise PermanentJobError(ErrorCode.INTERNAL, text, path="parameters")
        case "diverged":
            raise GroupBrokenError(text)
        case _:
            raise TransientJobError(ErrorCode.INTERNAL, text)
