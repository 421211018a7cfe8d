"""Every input of a job, staged: from the URIs of a draft to a plan with paths.

Owns which file is staged how and under which name. Leaves out the checks (`daemon.inputs` for images,
`daemon.media` for videos and audio) and trying again (`daemon.coordinator`).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from daemon.inputs import stage_image
from daemon.media import stage_audio, stage_video
from daemon.planning import Draft
from daemon.sections import InputsConfig
from parallel.plan import GenerationPlan
from parallel.tasks import INPUT_KINDS, MAY_BE_SHORTER


def stage_inputs(draft: Draft, folder: Path, config: InputsConfig, *, begin: Callable[[], None]) -> GenerationPlan:
    """Stages every input of `draft` under `folder`; what is there already is written again. Calls `begin` before each.

    Raises PermanentJobError(input_rejected) and TransientJobError(input_unavailable) with the input's path in the
    job, and OSError when the folder cannot be written.
    """
    plan = draft.plan
    staged: dict[str, Any] = {}
    for name, uri in draft.input_uris.items():
        begin()
        path = f"inputs.{name}"
        match INPUT_KINDS[name]:
            case "image":
                target = folder / name
                stage_image(uri, target, config, path=path)
            case "video":
                target = folder / f"{name}.npy"
                stage_video(
                    uri,
                    target,
                    config,
                    path=path,
                    width=plan.width,
                    height=plan.height,
                    num_frames=plan.num_frames,
                    may_be_shorter=name in MAY_BE_SHORTER,
                )
            case "audio":
                target = folder / f"{name}.npy"
                stage_audio(uri, target, config, path=path)
        staged[name] = str(target)
    return replace(plan, **staged)
