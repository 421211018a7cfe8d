"""Each memory strategy once: [torchrun -m] tests.distributed.strategies CASES.json OUTPUT.

For every strategy: frames without and with a LoRA, the bytes this rank read of the files, the bytes of weights that it
holds, whether the LoRA left the weights' bits as they were, and how a job ends when a rank runs out of memory.
"""

import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from parallel.engine import clean_up, generate_frames
from parallel.model import LoadedModel, load_model
from parallel.outcome import Stop
from parallel.plan import GenerationPlan, LoraPlan
from parallel.profile import check_model_folder, load_profile
from parallel.split import PinnedDegrees
from parallel.strategy import MemorySettings
from parallel.world import World, join, read_launch
from tests.distributed.places import check_places


def tensors_of(model: LoadedModel) -> dict[str, torch.Tensor]:
    """This rank's part of every tensor of the pipeline."""
    found = {**dict(model.pipeline.named_parameters()), **dict(model.pipeline.named_buffers())}
    return {name: each.to_local() if isinstance(each, DTensor) else each for name, each in found.items()}


def hash_weights(model: LoadedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(model).items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def bytes_read() -> int:
    """What this process has asked the kernel to read, the page cache included."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def plan_of(case: dict[str, Any], loras: tuple[LoraPlan, ...]) -> GenerationPlan:
    return GenerationPlan(
        job_id="strategies",
        attempt=1,
        task="text_to_video",
        model="two-experts",
        switch_boundary=0.9,
        input_image=None,
        time_limit_seconds=600,
        cfg_scale=5.0,
        loras=loras,
        **case["arguments"],
    )


def run(strategy: str, case: dict[str, Any], world: World) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    files = check_model_folder(load_profile(case["profile"]), Path(case["folder"]))
    before, progress = bytes_read(), []
    model = load_model(
        files,
        world=world,
        dtype="float32",
        memory=MemorySettings(strategy),
        progress=lambda done, total: progress.append((done, total)),
    )
    told: dict[str, Any] = {"read": bytes_read() - before, "progress": progress[-1]}
    told["rising"] = [done for done, _ in progress] == sorted(done for done, _ in progress)
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors_of(model).values()
    }
    told["weights"] = sum(storages.values())
    lora = LoraPlan(name="a", path=case["lora"], strength=0.7, target="both", version="1")
    original, frames = hash_weights(model), {}
    for name, loras in (("plain", ()), ("lora", (lora,)), ("again", ())):
        plan = plan_of(case, loras)
        plan = replace(plan, **asdict(model.degrees_for(plan, world, PinnedDegrees())))
        if name == "again":
            fail_in_mid_step(replace(plan, loras=(lora,)), model, world)
        made = generate_frames(plan, model, world, progress=lambda *_: None, decide=lambda: Stop.NO, quantised=False)
        check_places(world)
        if made is not None:
            frames[f"{strategy} {name}"] = made.contiguous()
    told["same_bits"] = hash_weights(model) == original
    return frames, told


class _ToldError(Exception):
    pass


def fail_in_mid_step(plan: GenerationPlan, model: LoadedModel, world: World) -> None:
    """A generation that fails in the first step, on rank 0 before its first block and on the others after theirs."""

    def fail(*_arguments: Any) -> None:
        raise _ToldError

    block = model.pipeline.dit.blocks[0]
    hook = block.register_forward_pre_hook(fail) if world.rank == 0 else block.register_forward_hook(fail)
    try:
        generate_frames(plan, model, world, progress=lambda *_: None, decide=lambda: Stop.NO)
    except _ToldError:
        clean_up(model, world.device)
    else:
        raise AssertionError("nothing was raised")
    finally:
        hook.remove()


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    world = join(read_launch(), device_kind="cpu")
    frames: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {}
    for strategy in case["strategies"]:
        made, told[strategy] = run(strategy, case, world)
        frames |= made
    all_told: list[Any] = [told]
    if world.world_size > 1:
        all_told = [None] * world.world_size
        dist.all_gather_object(all_told, told)
    if world.rank == 0:
        save_file(frames, sys.argv[2])
        Path(sys.argv[2] + ".json").write_text(json.dumps(all_told))
    world.leave()


if __name__ == "__main__":
    main()
