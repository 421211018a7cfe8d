"""From a plan to the arguments of DiffSynth's `WanVideoPipeline.__call__`: the staged files, opened.

Owns reading what `daemon.staging` wrote. Leaves out the defaults of what the plan does not decide, and what DiffSynth
makes of it all (`parallel.conditions`). Staged files are: an image as it came;
a video as a .npy array of uint8, (frames, height, width, 3), already at the plan's size; audio as a .npy array
of float32 samples, one channel.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from parallel.plan import GenerationPlan
from parallel.tasks import INPUT_KINDS

AUDIO_SAMPLE_RATE = 16_000
_SAME_NAME = (
    "prompt", "negative_prompt", "seed", "height", "width", "num_frames", "num_inference_steps", "cfg_scale",
    "sigma_shift", "denoising_strength", "vace_scale", "camera_control_direction", "camera_control_speed",
    "motion_bucket_id", "tiled",
)  # fmt: skip


def pipeline_arguments(plan: GenerationPlan) -> dict[str, Any]:
    """The arguments of `WanVideoPipeline.__call__` that `plan` decides; the others keep its defaults.

    Rank 0 only: the peers have no staged files.

    DiffSynth resizes most images itself, to the size of the video and without cropping. It takes VACE's
    reference image as it is, so that one is resized here, as DiffSynth's examples do. Raises OSError when a
    staged file is gone.
    """
    chosen = {name: getattr(plan, name) for name in _SAME_NAME}
    arguments: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    # On the CPU whatever the device, so that one seed gives one video on every machine.
    arguments["rand_device"] = "cpu"
    for name, kind in INPUT_KINDS.items():
        path = getattr(plan, name)
        if path is None:
            continue
        match kind:
            case "image":
                arguments[name] = _open_image(path)
            case "video":
                arguments[name] = _open_video(path)
            case "audio":
                arguments[name] = np.load(path, allow_pickle=False)
                arguments["audio_sample_rate"] = AUDIO_SAMPLE_RATE
    if plan.vace_reference_image is not None:
        image: Image.Image = arguments["vace_reference_image"]
        arguments["vace_reference_image"] = image.resize((plan.width, plan.height))
    return arguments


def _open_image(path: str) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _open_video(path: str) -> list[Image.Image]:
    frames = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    return [Image.fromarray(np.asarray(frame)) for frame in frames]
