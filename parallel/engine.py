"""Generating one plan on every rank.

Owns the call of DiffSynth's pipeline: its arguments, the hook into its denoising loop (progress, stopping at the
same step on every rank). Leaves out what a raised error means (`parallel.outcome`), who decides to stop
(`daemon.coordinator`) and what becomes of the frames (`daemon.video`).
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from parallel.inputs import pipeline_arguments
from parallel.model import LoadedModel
from parallel.outcome import NonFiniteError, Stop, StoppedError
from parallel.plan import GenerationPlan
from parallel.world import World

# progress(phase, step, steps) on every rank; decide() on rank 0 alone.
Progress = Callable[[str, int, int], None]
Decide = Callable[[], Stop]


def generate_frames(
    plan: GenerationPlan, model: LoadedModel, world: World, *, progress: Progress, decide: Decide
) -> torch.Tensor | None:
    """Called by every rank. Frames on rank 0, None on the peers.

    Returns (num_frames, height, width, 3) of floats in [-1, 1], on the CPU: DiffSynth's own output before it is
    quantised. Raises StoppedError on every rank alike, and whatever DiffSynth and torch raise.
    """
    pipeline = model.pipeline
    model.loras.set(plan.loras)
    progress("encode", 0, plan.num_inference_steps)

    def denoising(timesteps: Iterable[Any]) -> Iterator[Any]:
        steps = plan.num_inference_steps
        for step, timestep in enumerate(timesteps):
            stop = Stop(world.broadcast_flag(decide() if world.rank == 0 else 0))
            if stop is not Stop.NO:
                raise StoppedError(stop)
            progress("denoise", step, steps)
            yield timestep
        progress("decode", steps, steps)

    arguments = pipeline_arguments(plan)
    with torch.inference_mode():
        video = pipeline(progress_bar_cmd=denoising, output_type="floatpoint", **arguments)
    if video is None:
        return None
    frames: torch.Tensor = video[0].permute(1, 2, 3, 0).float().cpu()
    if not bool(torch.isfinite(frames).all()):
        raise NonFiniteError(f"the frames hold NaN or infinity (dtype {pipeline.torch_dtype})")
    return frames


def quantise(frame: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """One frame as uint8, (height, width, 3), by the arithmetic of DiffSynth's `vae_output_to_image`."""
    return ((frame + 1) * 127.5).clip(0, 255).to(torch.uint8).numpy()


def release_memory(device: torch.device) -> None:
    """After a failed attempt: gives cached blocks back, so that the next job starts clean."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Memory this rank uses and holds on its device; on the CPU, the process's resident set."""
    if device.type == "cuda":
        return {
            "memory_used_bytes": torch.cuda.memory_allocated(device),
            "memory_reserved_bytes": torch.cuda.memory_reserved(device),
        }
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * 4096
    return {"memory_used_bytes": resident, "memory_reserved_bytes": resident}
