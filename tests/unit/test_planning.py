"""From a job to a plan: nothing is left open, and what cannot be done is refused by its path."""

import json
from dataclasses import replace
from typing import Any, get_args

import pytest

from daemon.errors import ErrorCode, PermanentJobError
from daemon.job import Inputs, Job, Parameters, TaskName, make_job, parse_job_message
from daemon.planning import Draft, draft_plan
from daemon.sections import LimitsConfig
from parallel.profile import ModelProfile, load_profile
from parallel.tasks import INPUT_KINDS, TASK_PARAMETERS, TASKS

T2V, I2V = load_profile("tiny-t2v"), load_profile("tiny-i2v")
LIMITS = LimitsConfig()
IMAGE: dict[str, Any] = {"task": "image_to_video", "inputs": {"input_image": "https://example.org/a.png"}}


def job(**fields: Any) -> Job:
    body = {"schema": "reeld.job/1", "job_id": "job-1", "task": "text_to_video", "prompt": "a fox"} | fields
    return make_job(parse_job_message(json.dumps(body).encode(), max_body_bytes=1 << 20), message_id=None, attempt=3)


def draft(limits: LimitsConfig = LIMITS, **fields: Any) -> Draft:
    return draft_plan(job(**fields), {"tiny-t2v": T2V, "tiny-i2v": I2V}, limits)


def refusal(limits: LimitsConfig = LIMITS, **fields: Any) -> PermanentJobError:
    with pytest.raises(PermanentJobError) as caught:
        draft(limits, **fields)
    return caught.value


def test_what_a_job_leaves_out_comes_from_the_models_defaults() -> None:
    """A job with only a prompt gets every parameter of its model's profile."""
    made, defaults = draft(), T2V.defaults
    plan = made.plan
    assert (plan.job_id, plan.attempt, plan.model) == ("job-1", 3, "tiny-t2v")
    for name in ("height", "width", "num_frames", "num_inference_steps", "cfg_scale", "sigma_shift"):
        assert getattr(plan, name) == getattr(defaults, name)
    assert plan.negative_prompt == defaults.negative_prompt
    assert made.fps == defaults.fps
    assert plan.time_limit_seconds == LIMITS.time_limit_seconds


def test_what_a_job_says_wins_over_the_defaults() -> None:
    """Zero and the empty string are values, not absences."""
    plan = draft(parameters={"seed": 0, "cfg_scale": 0, "num_inference_steps": 7}, negative_prompt="").plan
    assert (plan.seed, plan.cfg_scale, plan.num_inference_steps, plan.negative_prompt) == (0, 0.0, 7, "")
    assert draft(output={"fps": 24}).fps == 24


@pytest.mark.parametrize(("asked", "frames"), [(1, 1), (2, 5), (5, 5), (6, 9), (80, 81), (81, 81)])
def test_frames_are_rounded_up_as_diffsynth_rounds_them(asked: int, frames: int) -> None:
    """num_frames becomes the next 4n+1."""
    assert draft(parameters={"num_frames": asked}).plan.num_frames == frames


def test_height_and_width_are_rounded_up_to_the_models_multiple() -> None:
    """Sizes become the next multiple of the model's own, and exact ones stay."""
    plan = draft(parameters={"height": 65, "width": 96}).plan
    assert (plan.height, plan.width) == (80, 96)


def test_a_missing_seed_is_drawn_once() -> None:
    """Two jobs without a seed get seeds of their own, resolved before any rank sees them."""
    seeds = {draft().plan.seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_jobs_time_limit_can_only_be_shorter_than_the_workers() -> None:
    """The worker's limit is the default and the ceiling."""
    assert draft(time_limit_seconds=5).plan.time_limit_seconds == 5
    assert draft(time_limit_seconds=1e6).plan.time_limit_seconds == LIMITS.time_limit_seconds


@pytest.mark.parametrize(
    ("fields", "path", "says"),
    [
        ({"parameters": {"height": 1296, "width": 1280}}, "parameters.height", "1658880 pixels a frame"),
        ({"parameters": {"num_frames": 242}}, "parameters.num_frames", "245 frames"),
        ({"parameters": {"num_inference_steps": 201}}, "parameters.num_inference_steps", "201 steps"),
        ({"prompt": "x" * 4001}, "prompt", "4001 characters"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt", "4001 characters"),
        ({"task": "image_to_video"}, "inputs.input_image", "needs an input_image"),
        ({"inputs": {"input_image": "data:,"}}, "inputs.input_image", "takes no input_image"),
    ],
)
def test_what_is_over_a_limit_is_refused_by_its_path(fields: dict[str, Any], path: str, says: str) -> None:
    """A job over this worker's limits, after rounding, is malformed and told the number that counted."""
    error = refusal(**fields)
    assert error.code is ErrorCode.MALFORMED_JOB
    assert error.path == path
    assert says in error.message


def test_the_task_picks_the_model() -> None:
    """An image goes to the model that takes one, and its URI stays out of the plan until it is staged."""
    made = draft(**IMAGE)
    assert made.plan.model == "tiny-i2v"
    assert made.plan.input_image is None
    assert made.input_uris == IMAGE["inputs"]


def profiles(**changed: Any) -> dict[str, ModelProfile]:
    """One model that does everything, and what it takes beyond that."""
    return {"all": replace(T2V, name="all", tasks=tuple(TASKS), **changed)}


def inputs(*names: str) -> dict[str, str]:
    return {name: f"https://example.org/{name}" for name in names}


@pytest.mark.parametrize("task", list(TASKS))
def test_each_task_takes_what_it_needs_and_nothing_else(task: str) -> None:
    """With its inputs a job is planned; with one fewer, or any other, it is refused by that input's path."""
    wants = TASKS[task]
    names = wants.required + wants.one_of[:1]
    parameters = {"camera_control_direction": "Left"} if task == "camera_to_video" else {}
    asked = {"task": task, "parameters": parameters}
    made = draft_plan(job(**asked, inputs=inputs(*names)), profiles(), LIMITS)
    assert made.input_uris == inputs(*names)
    assert made.plan.camera_control_direction == parameters.get("camera_control_direction")
    for missing in wants.required:
        with pytest.raises(PermanentJobError) as caught:
            draft_plan(job(**asked, inputs=inputs(*(set(names) - {missing}))), profiles(), LIMITS)
        assert (caught.value.code, caught.value.path) == (ErrorCode.MALFORMED_JOB, f"inputs.{missing}")
    for other in set(INPUT_KINDS) - set(wants.inputs):
        with pytest.raises(PermanentJobError) as caught:
            draft_plan(job(**asked, inputs=inputs(*names, other)), profiles(), LIMITS)
        assert (caught.value.code, caught.value.path) == (ErrorCode.MALFORMED_JOB, f"inputs.{other}")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"task": "vace"}, "inputs"),
        ({"parameters": {"denoising_strength": 0.5}}, "parameters.denoising_strength"),
        ({"parameters": {"vace_scale": 0.5}}, "parameters.vace_scale"),
        ({"parameters": {"switch_DiT_boundary": 0.5}}, "parameters.switch_DiT_boundary"),
        ({"task": "camera_to_video", "inputs": inputs("input_image")}, "parameters.camera_control_direction"),
        ({"task": "vace", "inputs": inputs("vace_video"), "parameters": {"motion_bucket_id": 1}},
         "parameters.motion_bucket_id"),
    ],
)  # fmt: skip
def test_a_parameter_of_another_task_is_refused(fields: dict[str, Any], path: str) -> None:
    """Never taken and then ignored."""
    with pytest.raises(PermanentJobError) as caught:
        draft_plan(job(**fields), profiles(), LIMITS)
    assert (caught.value.code, caught.value.path) == (ErrorCode.MALFORMED_JOB, path)


def test_what_only_some_models_take_picks_the_model() -> None:
    """A reference image goes to the first model that has a place for it, and is refused where none has."""
    asked = job(task="control_to_video", inputs=inputs("control_video", "reference_image"))
    plain = profiles()
    able = {"able": replace(profiles(optional_inputs=("reference_image",))["all"], name="able")}
    assert draft_plan(asked, plain | able, LIMITS).plan.model == "able"
    for refused, path in (
        (asked, "inputs.reference_image"),
        (job(parameters={"motion_bucket_id": 50}), "parameters.motion_bucket_id"),
    ):
        with pytest.raises(PermanentJobError) as caught:
            draft_plan(refused, plain, LIMITS)
        assert (caught.value.code, caught.value.path) == (ErrorCode.UNSUPPORTED_TASK, path)


def test_parameters_of_a_task_reach_the_plan_and_others_stay_diffsynths() -> None:
    """What a job leaves out is None in the plan, which is DiffSynth's own default."""
    asked = job(task="video_to_video", inputs=inputs("input_video"), parameters={"denoising_strength": 0.25})
    plan = draft_plan(asked, profiles(), LIMITS).plan
    assert (plan.denoising_strength, plan.vace_scale, plan.camera_control_speed) == (0.25, None, None)


def test_the_boundary_between_experts_is_the_jobs_or_the_profiles() -> None:
    """A model with two experts has a boundary of its own, and a job may move it."""
    two = profiles(switch_boundary=0.9)
    assert draft_plan(job(), two, LIMITS).plan.switch_boundary == 0.9
    assert draft_plan(job(), two, LIMITS).switches_experts
    assert not draft_plan(job(), profiles(), LIMITS).switches_experts
    moved = job(parameters={"switch_DiT_boundary": 0.5})
    assert draft_plan(moved, two, LIMITS).plan.switch_boundary == 0.5


def test_the_schema_and_the_table_know_the_same_tasks_and_inputs() -> None:
    """The job's schema spells the names out; they are those of `parallel.tasks`."""
    assert get_args(TaskName) == tuple(TASKS)
    assert tuple(Inputs.model_fields) == tuple(INPUT_KINDS)
    assert set(TASK_PARAMETERS) <= set(Parameters.model_fields)
    assert {name for task in TASKS.values() for name in task.inputs} == set(INPUT_KINDS)


def test_a_task_that_no_model_offers_is_refused() -> None:
    """The refusal names the tasks that this pool does offer."""
    with pytest.raises(PermanentJobError) as caught:
        draft_plan(job(**IMAGE), {"tiny-t2v": T2V}, LIMITS)
    assert caught.value.code is ErrorCode.UNSUPPORTED_TASK
    assert caught.value.path == "task"
    assert "text_to_video" in caught.value.message


def test_a_step_cache_needs_a_polynomial() -> None:
    """The threshold goes into the plan of a model that TeaCache knows, and is refused for another."""
    asked: dict[str, Any] = {"parameters": {"tea_cache_l1_thresh": 0.1}}
    assert draft(**asked).plan.tea_cache_l1_thresh == 0.1
    unknown = replace(T2V, tea_cache_model_id=None)
    with pytest.raises(PermanentJobError) as caught:
        draft_plan(job(**asked), {"tiny-t2v": unknown}, LIMITS)
    assert caught.value.path == "parameters.tea_cache_l1_thresh"
