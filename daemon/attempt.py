"""One attempt to generate a plan, on one rank, and what the ranks agree on afterwards.

Owns turning a raised error into an outcome, waiting for the others' outcomes, noticing that they never come, and the
verdict. Leaves out
what the verdict means for the job (`daemon.coordinator`).
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

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
from parallel.collectives import place
from parallel.engine import clean_up, generate_frames
from parallel.model import LoadedModel
from parallel.outcome import Stop, outcome_of
from parallel.plan import GenerationPlan, Outcome
from parallel.world import OutcomesMissingError, World

log = structlog.get_logger("generate")

_DIVERGENCE_TICK_SECONDS = 0.5
_PEER_PATIENCE = 4


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
    wait for but the next command. Raises GroupBrokenError when some rank does not report within the grace, and, on rank
    0, when the ranks failed at different places: the group cannot go on.
    """
    work = f"{plan.model} {plan.width}x{plan.height}x{plan.num_frames} {[lora.name for lora in plan.loras]}"

    def on_progress(phase: str, step: int, steps: int) -> None:
        context.state.set("generating", phase=phase, work=work, job_id=plan.job_id, step=step, steps=steps)
        progress(phase, step, steps)

    frames, error = None, None
    try:
        frames = generate_frames(plan, context.models[plan.model], context.world, progress=on_progress, decide=decide)
    except Exception as caught:  # noqa: BLE001  whatever the attempt raised becomes this rank's outcome
        error = caught
    outcome = replace(outcome_of(error, context.world.rank), place=place())
    if outcome.code in ("internal", "out_of_memory", "non_finite", "diverged"):
        log.error("attempt_failed", code=outcome.code, message=outcome.message, exc_info=error)
    context.state.set("agreeing", job_id=plan.job_id)
    context.world.report_outcome(outcome)
    if error is not None:
        del error
        clean_up(context.models[plan.model], context.world.device)
    if outcome.ok and context.world.rank != 0:
        return None, None
    # A peer's end would take rank 0 along, which must settle the job first; it ends the group itself.
    grace = context.outcome_grace_seconds * (1 if context.world.rank == 0 else _PEER_PATIENCE)
    try:
        outcomes = context.world.gather_outcomes(grace_seconds=grace)
    except OutcomesMissingError as missing:
        raise GroupBrokenError(
            f"{missing} within {grace} s; this rank: {outcome.code or 'ok'}", context.world.reported_outcomes()
        ) from missing
    if context.world.rank == 0 and not all(each.ok for each in outcomes) and not _stopped_together(outcomes):
        raise GroupBrokenError("the ranks failed at different places", outcomes)
    return frames, outcomes


def _stopped_together(outcomes: Sequence[Outcome]) -> bool:
    """Whether the ranks had begun the same transfers: one that some began and some did not would be met by the next
    job's."""
    return len({outcome.place for outcome in outcomes}) == 1


class DivergenceWatch:
    """Rank 0's eye on its peers during one attempt; a context manager around it.

    A rank that fails alone leaves the others inside a collective that never ends, rank 0's main thread among them. When
    some rank has reported a failure and rank 0 has not come back within the grace, `on_diverged(outcomes)` is called,
    from a thread of this watch, and must end the process.
    """

    def __init__(self, context: RankContext, on_diverged: Callable[[list[Outcome]], NoReturn]) -> None:
        self._context = context
        self._on_diverged = on_diverged
        self._over = threading.Event()
        self._one = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="divergence-watch", daemon=True)

    def __enter__(self) -> None:
        if self._context.world.world_size > 1:
            self._thread.start()

    def __exit__(self, *_error: object) -> None:
        with self._one:  # held for good once the watch has taken the matter into its hands
            self._over.set()

    def _run(self) -> None:
        world, since = self._context.world, None
        while not self._over.wait(_DIVERGENCE_TICK_SECONDS):
            if all(outcome.ok for outcome in world.reported_outcomes()):
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > self._context.outcome_grace_seconds:
                with self._one:
                    if not self._over.is_set():
                        self._on_diverged(world.reported_outcomes())


def raise_for_outcomes(outcomes: Sequence[Outcome], *, world_size: int) -> None:
    """Raises what the ranks' outcomes, as far as there are any, mean for the job; nothing when all went well."""
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if not failed:
        return
    # A rank that could not go on because of another one's error says `internal`; the cause says more.
    first = next((outcome for outcome in failed if outcome.code != "internal"), failed[0])
    text = f"rank {first.rank}: {first.message}" if world_size > 1 else first.message
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
