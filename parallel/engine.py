"""Generating one plan on every rank: conditions, denoising, decoding.

Owns the order of a generation, and the hook before each step (progress, stopping at the same step on every rank).
Leaves out the parts (`parallel.conditions`, `parallel.denoise`), what a raised error means (`parallel.outcome`), who
decides to stop (`daemon.coordinator`) and what becomes of the frames (`daemon.video`).
"""

import gc
import os
import resource
from collections.abc import Callable

import torch

from parallel.conditions import prepare_conditions
from parallel.decode import decode_frames, latents_to_decode
from parallel.denoise import Guidance, denoise
from parallel.inputs import pipeline_arguments
from parallel.model import LoadedModel
from parallel.outcome import Stop, StoppedError
from parallel.plan import GenerationPlan
from parallel.split import ParallelDegrees
from parallel.step_cache import StepCache
from parallel.vae import Tiles
from parallel.world import World

# progress(phase, step, steps) on every rank; decide() on rank 0 alone.
Progress = Callable[[str, int, int], None]
Decide = Callable[[], Stop]


@torch.no_grad()
def generate_frames(
    plan: GenerationPlan,
    model: LoadedModel,
    world: World,
    *,
    progress: Progress,
    decide: Decide,
    quantised: bool = True,
) -> torch.Tensor | None:
    """Called by every rank. Frames on rank 0, None on the peers.

    Returns (num_frames, height, width, 3) on the CPU: uint8, or, not `quantised`, floats in [-1, 1] in the model's
    dtype. Raises StoppedError on every rank alike, the errors of `parallel.outcome`, and whatever DiffSynth and torch
    raise.
    """
    pipeline, steps = model.pipeline, plan.num_inference_steps
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    model.loras.set(plan.loras)
    progress("encode", 0, steps)

    def before_step(step: int) -> None:
        stop = Stop(world.broadcast_flag(decide() if world.rank == 0 else 0))
        if stop is not Stop.NO:
            raise StoppedError(stop)
        progress("denoise", step, steps)

    # Only rank 0 has the staged files; what every rank needs of them comes with the conditions.
    conditions = prepare_conditions(pipeline, lambda: pipeline_arguments(plan), world, prompts=model.prompts)
    degrees = ParallelDegrees(
        cfg_degree=plan.cfg_degree, ulysses_degree=plan.ulysses_degree, ring_degree=plan.ring_degree
    )
    latents = denoise(
        pipeline,
        shared=conditions.shared,
        positive=conditions.positive,
        negative=conditions.negative,
        guidance=Guidance(cfg_scale=plan.cfg_scale, switch_boundary=plan.switch_boundary),
        world=world,
        groups=world.groups.groups_of(degrees),
        tables=model.tables,
        before_step=before_step,
        step_cache=StepCache.plan(
            [each for each in (pipeline.dit, pipeline.dit2) if each is not None],
            [float(each) for each in pipeline.scheduler.timesteps],
            switch_boundary=plan.switch_boundary,
            threshold=plan.tea_cache_l1_thresh,
            model_id=model.files.profile.tea_cache_model_id or "",
            dtype=pipeline.torch_dtype,
        ),
    )
    model.let_go()
    latents = latents_to_decode(latents, conditions)
    tiles = Tiles(conditions.shared["tile_size"], conditions.shared["tile_stride"]) if plan.tiled else None
    del conditions  # a camera's or VACE's is as large as a video
    progress("decode", steps, steps)
    return decode_frames(pipeline, latents, world, tiles=tiles, quantised=quantised)


def clean_up(model: LoadedModel, device: torch.device) -> None:
    """After a failed attempt, on the ranks that it failed on: the next job finds the model, and the memory, as it was.

    Talks to no other rank.
    """
    model.let_go()
    model.pipeline.load_models_to_device([])  # another model's weights would find their place taken
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_bytes(device: torch.device) -> dict[str, int]:
    """What of its device's memory this rank uses, what its allocator holds, and the most it used in the last job.

    On the CPU: the process's resident set, and the most that was ever resident.
    """
    if device.type == "cuda":
        return {
            "memory_used_bytes": torch.cuda.memory_allocated(device),
            "memory_reserved_bytes": torch.cuda.memory_reserved(device),
            "memory_peak_bytes": torch.cuda.max_memory_allocated(device),
        }
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "memory_used_bytes": resident,
        "memory_reserved_bytes": resident,
        "memory_peak_bytes": max(resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    }
