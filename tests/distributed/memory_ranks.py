"""Measures what the memory model predicts: [torchrun -m] tests.distributed.memory_ranks CASES.json OUTPUT.json.

For each case, by phase: the most bytes alive on each rank, and the prediction for it.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from parallel.engine import generate_frames
from parallel.memory import JobShape, predict_memory
from parallel.model import load_model
from parallel.outcome import Stop
from parallel.plan import GenerationPlan
from parallel.profile import check_model_folder, load_profile
from parallel.split import ParallelDegrees, PinnedDegrees
from parallel.strategy import MemorySettings
from parallel.world import World, join, read_launch
from tests.distributed.live import LiveStorages
from tests.plans import PLAN


def measure(case: dict[str, Any], world: World) -> dict[str, Any]:
    folder = Path(case["folder"])
    memory = MemorySettings(case["strategy"])
    files = check_model_folder(load_profile(folder.name), folder)
    model = load_model(files, world=world, dtype=case["dtype"], memory=memory)
    plan = replace(
        PLAN,
        task=case["task"],
        model=folder.name,
        input_image=case.get("image"),
        tiled=case["tiled"],
        negative_prompt="blurry",
        num_inference_steps=1,
        **case["shape"],
    )
    degrees = model.degrees_for(plan, world, PinnedDegrees(**case["pinned"]))
    plan = replace(plan, **asdict(degrees))
    weights = [*model.pipeline.parameters(), *model.pipeline.buffers()]
    own = [each.to_local() if isinstance(each, DTensor) else each for each in weights]
    live = LiveStorages(own, resized=case["strategy"] == "fsdp")
    peaks: dict[str, int] = {}
    phase = "before"

    def progress(name: str, _step: int, _steps: int) -> None:
        nonlocal phase
        if name != phase:
            peaks[phase] = live.peak
            live.peak, phase = 0, name

    with live:
        generate_frames(plan, model, world, progress=progress, decide=lambda: Stop.NO)
    peaks[phase] = live.peak
    return {"measured": peaks, "predicted": _predict(case, plan, degrees, model.sizes, world.rank)}


def _predict(
    case: dict[str, Any], plan: GenerationPlan, degrees: ParallelDegrees, sizes: Any, rank: int
) -> dict[str, int]:
    shape = JobShape(
        height=plan.height,
        width=plan.width,
        num_frames=plan.num_frames,
        tiled=plan.tiled,
        frame_inputs=bool(plan.input_image or plan.vace_reference_image),
        references=int(plan.vace_reference_image is not None),
    )
    settings = MemorySettings(case["strategy"])
    found = predict_memory(sizes, shape, degrees=degrees, dtype=case["dtype"], memory=settings, on_gpu=False)[rank]
    # On a CPU what waits in host memory is in the same memory, whether it is also counted in a phase or not.
    weights = sum(found.weights.values())
    waiting = {name: size for name, size in found.host.items() if name != "frames"}
    totals: dict[str, int] = {}
    for phase, parts in found.phases.items():
        moving = sum(size for name, size in parts.items() if name not in (*waiting, "managed_layers"))
        frames = found.host.get("frames", 0) if phase == "decode" else 0
        together = phase.partition("_")[0]
        totals[together] = max(totals.get(together, 0), weights + sum(waiting.values()) + moving + frames)
    return totals


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    world = join(read_launch(), device_kind="cpu")
    torch.manual_seed(0)
    told = {case["name"]: measure(case, world) for case in cases}
    all_told: list[Any] = [told]
    if world.world_size > 1:
        all_told = [None] * world.world_size
        dist.all_gather_object(all_told, told)
    if world.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(all_told))
    world.leave()


if __name__ == "__main__":
    main()
