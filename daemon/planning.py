"""From a valid job to a plan: defaults, rounding, limits, and everything random resolved.

Owns which model does a job, and the refusal of inputs and parameters that its task or its model does not take.
Leaves out fetching the inputs (`daemon.staging`).
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from daemon.errors import ErrorCode, PermanentJobError
from daemon.job import Job
from daemon.sections import LimitsConfig
from parallel.plan import GenerationPlan
from parallel.profile import ModelProfile
from parallel.tasks import TASK_PARAMETERS, TASKS


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan without its staged inputs, and what rank 0 alone needs to know: `input_uris` by input; `switches_experts`,
    whether the model has two."""

    plan: GenerationPlan
    fps: int
    input_uris: dict[str, str]
    switches_experts: bool


def draft_plan(job: Job, profiles: Mapping[str, ModelProfile], limits: LimitsConfig) -> Draft:
    """Resolves all of a job. Raises PermanentJobError, with the field's path, for what cannot be done."""
    message, asked = job.message, job.message.parameters
    uris: dict[str, str] = message.inputs.model_dump(exclude_none=True)
    chosen: dict[str, Any] = message.parameters.model_dump(include=set(TASK_PARAMETERS), exclude_none=True)
    _check_task(message.task, uris, chosen)
    profile = _profile_for(message.task, uris, chosen, profiles)
    if asked.switch_DiT_boundary is not None and profile.switch_boundary is None:
        raise _malformed(f"{profile.name} has no second expert to switch to", "parameters.switch_DiT_boundary")
    defaults = profile.defaults
    height = round_up(asked.height or defaults.height, profile.height_multiple)
    width = round_up(asked.width or defaults.width, profile.width_multiple)
    num_frames = round_up((asked.num_frames or defaults.num_frames) - 1, 4) + 1
    steps = asked.num_inference_steps or defaults.num_inference_steps
    _at_most(height * width, limits.max_pixels_per_frame, "parameters.height", "pixels a frame")
    _at_most(num_frames, limits.max_num_frames, "parameters.num_frames", "frames")
    _at_most(steps, limits.max_num_inference_steps, "parameters.num_inference_steps", "steps")
    _at_most(len(message.prompt), limits.max_prompt_characters, "prompt", "characters")
    _at_most(len(message.negative_prompt or ""), limits.max_prompt_characters, "negative_prompt", "characters")
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
        switch_boundary=asked.switch_DiT_boundary or profile.switch_boundary or 0.875,
        input_image=None,
        tea_cache_l1_thresh=_step_cache(asked.tea_cache_l1_thresh, profile),
        time_limit_seconds=min(message.time_limit_seconds or limits.time_limit_seconds, limits.time_limit_seconds),
        **chosen,
    )
    return Draft(
        plan=plan,
        fps=message.output.fps or defaults.fps,
        input_uris=uris,
        switches_experts=profile.switch_boundary is not None,
    )


def _step_cache(threshold: float | None, profile: ModelProfile) -> float | None:
    if threshold is not None and profile.tea_cache_model_id is None:
        raise PermanentJobError(
            ErrorCode.UNSUPPORTED_TASK,
            f"{profile.name} has no step cache: TeaCache has no polynomial for it",
            path="parameters.tea_cache_l1_thresh",
        )
    return threshold


def _check_task(task: str, uris: Mapping[str, str], parameters: Mapping[str, Any]) -> None:
    """Refuses, by its path, what the task lacks and what it does not take."""
    wants = TASKS[task]
    for name in wants.required:
        if name not in uris:
            raise _malformed(
                f"{task} needs an {name}" if name[0] in "aeiou" else f"{task} needs a {name}", f"inputs.{name}"
            )
    if wants.one_of and not any(name in uris for name in wants.one_of):
        raise _malformed(f"{task} needs one of {', '.join(wants.one_of)}", "inputs")
    for name in uris:
        if name not in wants.inputs:
            raise _malformed(f"{task} takes no {name}", f"inputs.{name}")
    for name in wants.required_parameters:
        if name not in parameters:
            raise _malformed(f"{task} needs {name}", f"parameters.{name}")
    for name in parameters:
        if name not in wants.parameters:
            raise _malformed(f"{task} takes no {name}", f"parameters.{name}")


def _profile_for(
    task: str, uris: Mapping[str, str], parameters: Mapping[str, Any], profiles: Mapping[str, ModelProfile]
) -> ModelProfile:
    """The pool's first model that does the task with these inputs and parameters."""
    able = [profile for profile in profiles.values() if task in profile.tasks]
    if not able:
        offered = sorted({task for profile in profiles.values() for task in profile.tasks})
        raise PermanentJobError(
            ErrorCode.UNSUPPORTED_TASK,
            f"{task} is not among this pool's tasks: {', '.join(offered)}",
            path="task",
        )
    refused = [_refused_by(profile, task, uris, parameters) for profile in able]
    for profile, path in zip(able, refused, strict=True):
        if path is None:
            return profile
    path = refused[0] or ""
    raise PermanentJobError(
        ErrorCode.UNSUPPORTED_TASK,
        f"{', '.join(profile.name for profile in able)}: no model of this pool takes {path.partition('.')[2]}",
        path=path,
    )


def _refused_by(profile: ModelProfile, task: str, uris: Mapping[str, str], parameters: Mapping[str, Any]) -> str | None:
    """The path of what the model does not take although its task may have it; None when it takes all."""
    for name in TASKS[task].optional:
        if name in uris and name not in profile.optional_inputs:
            return f"inputs.{name}"
    has_controller = any(part.role == "motion_controller" for part in profile.parts)
    if "motion_bucket_id" in parameters and not has_controller:
        return "parameters.motion_bucket_id"
    return None


def _at_most(value: int, limit: int, path: str, unit: str) -> None:
    if value > limit:
        raise _malformed(f"{value} {unit}; this worker allows {limit}", path)


def _malformed(message: str, path: str) -> PermanentJobError:
    return PermanentJobError(ErrorCode.MALFORMED_JOB, message, path=path)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
