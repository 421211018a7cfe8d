"""From a valid job to a plan: defaults, rounding, limits, and everything random resolved.

Leaves out fetching the inputs (`daemon.inputs`).
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from daemon.config import LimitsConfig
from daemon.errors import ErrorCode, PermanentJobError
from daemon.job import Job
from parallel.plan import GenerationPlan, check_sequence
from parallel.profile import ModelProfile


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan without its staged input, and what rank 0 alone needs to know."""

    plan: GenerationPlan
    fps: int
    image_uri: str | None


def draft_plan(job: Job, profiles: Mapping[str, ModelProfile], limits: LimitsConfig, *, world_size: int) -> Draft:
    """Resolves all of a job. Raises PermanentJobError, with the field's path, for what cannot be done."""
    message, asked = job.message, job.message.parameters
    profile = _profile_for(message.task, profiles)
    defaults = profile.defaults
    height = _round_up(asked.height or defaults.height, profile.height_multiple)
    width = _round_up(asked.width or defaults.width, profile.width_multiple)
    num_frames = _round_up((asked.num_frames or defaults.num_frames) - 1, 4) + 1
    steps = asked.num_inference_steps or defaults.num_inference_steps
    _at_most(height * width, limits.max_pixels_per_frame, "parameters.height", "pixels a frame")
    _at_most(num_frames, limits.max_num_frames, "parameters.num_frames", "frames")
    _at_most(steps, limits.max_num_inference_steps, "parameters.num_inference_steps", "steps")
    _at_most(len(message.prompt), limits.max_prompt_characters, "prompt", "characters")
    _at_most(len(message.negative_prompt or ""), limits.max_prompt_characters, "negative_prompt", "characters")
    _check_image(message.task, message.inputs.input_image)
    tokens = ((num_frames - 1) // 4 + 1) * (height // profile.height_multiple) * (width // profile.width_multiple)
    try:
        check_sequence(num_tokens=tokens, world_size=world_size)
    except ValueError as error:
        raise PermanentJobError(ErrorCode.UNSUPPORTED_TASK, str(error), path="parameters") from error
    plan = GenerationPlan(
        job_id=job.job_id,
        attempt=job.attempt,
        task=message.task,
        model=profile.name,
        prompt=message.prompt,
        negative_prompt=defaults.negative_prompt if message.negative_prompt is None else message.negative_prompt,
        # Resolved here, once: with seed=None every rank would draw noise of its own.
        seed=asked.seed if asked.seed is not None else secrets.randbelow(2**32),
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        cfg_scale=defaults.cfg_scale if asked.cfg_scale is None else asked.cfg_scale,
        sigma_shift=asked.sigma_shift or defaults.sigma_shift,
        switch_boundary=0.875 if profile.switch_boundary is None else profile.switch_boundary,
        input_image=None,
        time_limit_seconds=min(message.time_limit_seconds or limits.time_limit_seconds, limits.time_limit_seconds),
    )
    return Draft(plan=plan, fps=message.output.fps or defaults.fps, image_uri=message.inputs.input_image)


def _profile_for(task: str, profiles: Mapping[str, ModelProfile]) -> ModelProfile:
    for profile in profiles.values():
        if task in profile.tasks:
            return profile
    offered = sorted({task for profile in profiles.values() for task in profile.tasks})
    raise PermanentJobError(
        ErrorCode.UNSUPPORTED_TASK,
        f"{task} is not among this pool's tasks: {', '.join(offered)}",
        path="task",
    )


def _check_image(task: str, uri: str | None) -> None:
    path = "inputs.input_image"
    if task == "image_to_video" and uri is None:
        raise PermanentJobError(ErrorCode.MALFORMED_JOB, "image_to_video needs an input_image", path=path)
    if task == "text_to_video" and uri is not None:
        raise PermanentJobError(ErrorCode.MALFORMED_JOB, "text_to_video takes no input_image", path=path)


def _at_most(value: int, limit: int, path: str, unit: str) -> None:
    if value > limit:
        raise PermanentJobError(ErrorCode.MALFORMED_JOB, f"{value} {unit}; this worker allows {limit}", path=path)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
