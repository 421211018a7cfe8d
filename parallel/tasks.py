"""The tasks: what each one needs, and what it can take.

Owns the closed list of tasks and, for each, the inputs and parameters that belong to it, in DiffSynth's
spellings. Leaves out the job's schema and the refusals (`daemon.job`, `daemon.planning`), and which model does
which task (`parallel.profile`). Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["image", "video", "audio"]

# What a job may bring, by the name of DiffSynth's argument, and what each is.
INPUT_KINDS: dict[str, Kind] = {
    "input_image": "image",
    "end_image": "image",
    "input_video": "video",
    "control_video": "video",
    "reference_image": "image",
    "vace_video": "video",
    "vace_video_mask": "video",
    "vace_reference_image": "image",
    "input_audio": "audio",
    "s2v_pose_video": "video",
}
# DiffSynth fills a shorter pose video up itself; every other video must have a frame for each frame made.
MAY_BE_SHORTER = ("s2v_pose_video",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a job of one task must and may bring.

    `optional` inputs are taken where the model's profile lists them in `optional_inputs`. `one_of`: at least one
    of these. `parameters`: those of this task alone, beside the ones that every task has.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    required_parameters: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every input that a job of this task may name."""
        return self.required + self.one_of + self.optional


TASKS: dict[str, Task] = {
    "text_to_video": Task(parameters=("motion_bucket_id",)),
    "image_to_video": Task(required=("input_image",)),
    "first_last_frame_to_video": Task(required=("input_image", "end_image")),
    "video_to_video": Task(required=("input_video",), parameters=("denoising_strength",)),
    "vace": Task(one_of=("vace_video", "vace_video_mask", "vace_reference_image"), parameters=("vace_scale",)),
    "control_to_video": Task(required=("control_video",), optional=("reference_image", "input_image")),
    "camera_to_video": Task(
        required=("input_image",),
        parameters=("camera_control_direction", "camera_control_speed"),
        required_parameters=("camera_control_direction",),
    ),
    "speech_to_video": Task(required=("input_image", "input_audio"), optional=("s2v_pose_video",)),
}
# Parameters that some task has for itself alone.
TASK_PARAMETERS = tuple(sorted({name for task in TASKS.values() for name in task.parameters}))
