"""The denoising loop: guidance, the steps, the switch of experts, and what is watched on the way.

The equal of the loop in DiffSynth's `WanVideoPipeline.__call__` (2.1.12), over a split of the ranks: with a CFG degree
of 2 each half of the ranks predicts one branch, and the two meet once a step. Every rank holds the whole latents, in
equal bits. Nothing in the loop waits for the device except for the step before the last, so that the host is never
more than one step ahead and progress, cancelling and stall limits stay honest.

Leaves out the conditions (`parallel.conditions`), one forward (`parallel.forward`) and decoding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.checks import DivergenceCheck, FiniteCheck, check_consistency
from parallel.forward import BranchMemory
from parallel.groups import SplitGroups, all_gather
from parallel.rope import RopeTables
from parallel.step_cache import StepCache
from parallel.world import World

# before_step(step): called on every rank before each step; raises to stop.
BeforeStep = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How the two branches are joined, and where the low-noise expert takes over."""

    cfg_scale: float
    switch_boundary: float

    @property
    def guided(self) -> bool:
        """Whether the negative branch counts; DiffSynth's own test."""
        return self.cfg_scale != 1.0


@dataclass(slots=True)
class Branch:
    """One branch of guidance, as far as this rank predicts it."""

    inputs: dict[str, Any]
    memory: BranchMemory


def denoise(
    pipeline: Any,
    *,
    shared: dict[str, Any],
    positive: dict[str, Any],
    negative: dict[str, Any],
    guidance: Guidance,
    world: World,
    groups: SplitGroups,
    tables: RopeTables,
    before_step: BeforeStep,
    step_cache: StepCache,
    divergence_interval: int = 10,
) -> Tensor:
    """Called by every rank, with equal conditions. Returns the latents, (1, channels, frames, height, width).

    `shared`, `positive` and `negative` are the conditions by DiffSynth's names, on the device. Raises NonFiniteError
    on every rank alike when the latents are no numbers, DivergedError when the ranks' latents differ,
    InconsistentError before the first step when a tensor is where or what it must not be.
    """
    scheduler, latents = pipeline.scheduler, shared["latents"]
    experts = [expert for expert in (pipeline.dit, pipeline.dit2) if expert is not None]
    check_consistency(experts, {**shared, **positive}, device=world.device, dtype=pipeline.torch_dtype, rank=world.rank)
    prompts = [positive, negative] if guidance.guided else [positive]
    camera: dict[int, Tensor] = {}  # is the same for both
    branches = [Branch({**shared, **prompt}, BranchMemory(camera=camera)) for prompt in prompts]
    if groups.cfg.size > 1:
        branches = [branches[groups.cfg.rank]]
    timesteps = [float(each) for each in scheduler.timesteps]
    # At once: a copy from ordinary host memory waits for all that is queued, and so would each step for the last one.
    on_device = scheduler.timesteps.to(dtype=pipeline.torch_dtype, device=world.device)
    finite, divergence = FiniteCheck(), DivergenceCheck(world, interval=divergence_interval)
    pace = _Pace(world.device)
    expert, vace = pipeline.dit, pipeline.vace
    pipeline.load_models_to_device(pipeline.in_iteration_models)
    for step, value in enumerate(timesteps):
        pace.wait()
        finite.raise_if_known()
        before_step(step)
        if value < guidance.switch_boundary * 1000 and pipeline.dit2 is not None and expert is not pipeline.dit2:
            expert, vace = pipeline.dit2, pipeline.vace2
            pipeline.load_models_to_device(pipeline.in_iteration_models_2)
            for branch in branches:  # what the first expert kept is needed no more
                branch.memory.forget()
        predictions = [
            expert(
                latents=latents,
                timestep=on_device[step : step + 1],
                inputs=branch.inputs,
                groups=groups,
                tables=tables,
                memory=branch.memory,
                vace=vace,
                motion_controller=pipeline.motion_controller,
                reuse_residual=step_cache.reuse[step],
                keep_residual=step_cache.active,
            )
            for branch in branches
        ]
        latents = scheduler.step(_guide(predictions, guidance, groups), scheduler.timesteps[step], latents)
        if "first_frame_latents" in shared:
            latents[:, :, 0:1] = shared["first_frame_latents"]
        finite.look(latents)
        divergence.look(latents, step=step, last=step + 1 == len(timesteps))
        pace.mark()
    finite.settle()
    divergence.settle()
    result: Tensor = latents
    return result


def _guide(predictions: list[Tensor], guidance: Guidance, groups: SplitGroups) -> Tensor:
    """Joins the branches in DiffSynth's order of operations."""
    if not guidance.guided:
        only: Tensor = predictions[0]
        return only
    if groups.cfg.size > 1:
        positive, negative = all_gather(predictions[0], groups.cfg).unbind(0)
    else:
        positive, negative = predictions
    joined: Tensor = negative + guidance.cfg_scale * (positive - negative)
    return joined


class _Pace:
    """Keeps the host at most one step ahead of the device: the next step is queued while the last one runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._marks.append(event)

    def wait(self) -> None:
        if len(self._marks) > 1:
            self._marks.pop(0).synchronize()
