"""Warming up: before the first job, one step at the shapes that jobs will have.

The first step at a shape compiles kernels (or takes them from the disk), and the first of all also starts NCCL and
chooses an attention kernel: seconds that no job should wait for. Rank 0 sends the ranks a plan of one step like any
job's. Leaves out what a job's plan is made of (`daemon.planning`).
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import structlog
from PIL import Image

from daemon.attempt import RankContext, attempt_plan, raise_for_outcomes
from daemon.config import Config
from daemon.errors import JobError
from daemon.logs import leave_mark
from daemon.planning import round_up
from parallel.outcome import Stop
from parallel.plan import Generate, GenerationPlan
from parallel.profile import ModelProfile

log = structlog.get_logger("warm_up")

JOB_ID = "warm-up"
_SECONDS = 3600.0


def warm_up(config: Config, context: RankContext, *, compiles: bool, mark: Path | None) -> None:
    """Called by rank 0, while its peers wait for commands. What fails is logged: the first job will say more.

    `mark` is there while this runs. A group that finds it does without: what broke the last one would break this one,
    and so on, and no job would be served. Raises GroupBrokenError when the ranks no longer agree.
    """
    shapes = config.parallel.warm_up
    if shapes == "auto" and not compiles:
        return
    if mark is not None and mark.exists():
        log.warning("not_warmed_up", reason="the last group broke while it did")
        return
    if mark is not None:
        leave_mark(mark)
    with tempfile.TemporaryDirectory(prefix="reeld-warm-up-") as scratch:
        for name, model in context.models.items():
            for plan in _plans(model.files.profile, shapes, Path(scratch)):
                degrees = model.degrees_for(plan, context.world, config.parallel.pinned())
                _run(replace(plan, **asdict(degrees), tiled=config.parallel.vae == "tiled"), context, name)
    if mark is not None:
        mark.unlink(missing_ok=True)


def _run(plan: GenerationPlan, context: RankContext, name: str) -> None:
    shape = f"{plan.height}x{plan.width}x{plan.num_frames}"
    begun = time.monotonic()
    context.world.broadcast_command(Generate(plan))
    _, outcomes = attempt_plan(plan, context, decide=lambda: Stop.NO, progress=lambda _phase, _step, _steps: None)
    try:
        raise_for_outcomes(outcomes or [], world_size=context.world.world_size)
    except JobError as error:
        log.warning("warm_up_failed", model=name, shape=shape, reason=str(error))
    else:
        log.info("warmed_up", model=name, shape=shape, seconds=round(time.monotonic() - begun, 3))


def _plans(profile: ModelProfile, shapes: str | tuple[str, ...], scratch: Path) -> Iterator[GenerationPlan]:
    """A plan for each shape; none for a model whose tasks all need more than a prompt and an image."""
    defaults = profile.defaults
    task = next((task for task in ("text_to_video", "image_to_video") if task in profile.tasks), None)
    if task is None:
        log.info("not_warmed_up", model=profile.name, reason="its tasks need inputs that cannot be made up")
        return
    own = f"{defaults.height}x{defaults.width}x{defaults.num_frames}"
    for shape in (own,) if isinstance(shapes, str) else shapes:
        height, width, num_frames = map(int, shape.split("x"))
        image = None
        if task == "image_to_video":
            image = scratch / f"{width}x{height}.png"
            Image.new("RGB", (width, height)).save(image)
        yield GenerationPlan(
            job_id=JOB_ID,
            attempt=1,
            task=task,
            model=profile.name,
            prompt="",
            negative_prompt=defaults.negative_prompt,  # its embedding stays in the cache
            seed=0,
            height=round_up(height, profile.height_multiple),
            width=round_up(width, profile.width_multiple),
            num_frames=round_up(num_frames - 1, 4) + 1,
            num_inference_steps=1,
            cfg_scale=defaults.cfg_scale,
            sigma_shift=defaults.sigma_shift,
            switch_boundary=profile.switch_boundary or 0.875,
            input_image=None if image is None else str(image),
            time_limit_seconds=_SECONDS,
        )
