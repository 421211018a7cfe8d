"""The cases of `reference_lora.py` through reeld's ranks, one model for all: ours_lora CASES.json OUTPUT.

Also writes OUTPUT.json: a hash of all the weights of every rank, before the cases, within each, and after all; and
OUTPUT.kept.json: what each rank has kept of the original weights, over what was predicted.
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

from parallel import lora as lora_module
from parallel.engine import generate_frames
from parallel.memory import lora_bytes
from parallel.model import LoadedModel, load_model
from parallel.outcome import Stop, outcome_of
from parallel.plan import Generate, GenerationPlan, LoraPlan
from parallel.profile import check_model_folder, load_profile
from parallel.split import PinnedDegrees
from parallel.strategy import MemorySettings
from parallel.world import World, join, read_launch


def hash_weights(model: LoadedModel, world: World) -> list[str]:
    """One hash a rank, over the bits of every tensor that all ranks have: both DiTs and the VAE."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.pipeline.state_dict().items()):
        if not name.startswith(("dit", "vae")):
            continue
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    found = [digest.hexdigest()]
    if world.world_size > 1:
        found = [""] * world.world_size
        dist.all_gather_object(found, digest.hexdigest())
    return found


def put_into_every_layer(model: LoadedModel, world: World, path: Path) -> tuple[list[str], list[float]]:
    """A LoRA of every linear layer there is, in and out again. Returns the hashes afterwards, and for each rank what
    it has kept of the originals over what was predicted."""
    if world.rank == 0:
        layers = next(iter(model.loras.shapes.values()))
        tensors: dict[str, torch.Tensor] = {}
        for layer, (rows, columns) in layers.items():
            tensors |= {f"{layer}.lora_down.weight": torch.ones(1, columns)}
            tensors |= {f"{layer}.lora_up.weight": torch.ones(rows, 1)}
        save_file(tensors, path)
    before = hash_weights(model, world)
    model.loras.set([LoraPlan(name="every", path=str(path), strength=0.1, target="both", version="1")])
    assert hash_weights(model, world) != before
    model.loras.set(())
    element = model.pipeline.torch_dtype.itemsize
    predicted = lora_bytes(model.sizes, world_size=world.world_size, element=element, memory=MemorySettings())
    kept = sum(original.nbytes for original in model.loras._originals.values())
    shares = [kept / predicted["lora_originals"]] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(shares, shares[0])
    return hash_weights(model, world), shares


def plan_of(case: dict[str, Any], arguments: dict[str, Any]) -> GenerationPlan:
    return GenerationPlan(
        job_id=case["name"],
        attempt=1,
        task="text_to_video",
        model="two-experts",
        switch_boundary=case["arguments"]["switch_DiT_boundary"],
        input_image=None,
        time_limit_seconds=600,
        loras=tuple(
            LoraPlan(
                name=each["path"], path=each["path"], strength=each["strength"], target=each["target"], version="1"
            )
            for each in case["loras"]
        ),
        **arguments,
        **{key: value for key, value in case["arguments"].items() if key != "switch_DiT_boundary"},
    )


def fail_on_the_last_rank(model: LoadedModel, world: World, plan: GenerationPlan) -> list[str]:
    """The last rank runs out of memory in mid-way: every rank raises. Returns the hashes afterwards."""
    whole, calls = lora_module._Factors.product, iter(range(1000))

    def product(*arguments: Any) -> torch.Tensor:
        if world.rank == world.world_size - 1 and next(calls) == 9:
            raise torch.OutOfMemoryError("pretended")
        return whole(*arguments)

    lora_module._Factors.product = product  # type: ignore[assignment,method-assign]
    try:
        model.loras.set(plan.loras)
    except RuntimeError:
        assert model.loras.applied == ()
    else:
        raise AssertionError("nothing was raised")
    finally:
        lora_module._Factors.product = whole  # type: ignore[method-assign]
    return hash_weights(model, world)


def fail_to_read(model: LoadedModel, world: World, plan: GenerationPlan) -> list[str]:
    """Rank 0 runs out of memory over a file: every rank hears of it, as that. Returns the hashes afterwards."""
    whole = lora_module._read_file

    def read(*_: Any) -> Any:
        raise MemoryError("pretended")

    lora_module._read_file = read  # type: ignore[assignment]
    caught: Exception | None = None
    try:
        model.loras.set([replace(lora, version="another") for lora in plan.loras])
    except Exception as error:  # noqa: BLE001  whatever it is, is the subject
        caught = error
    finally:
        lora_module._read_file = whole
    assert outcome_of(caught, world.rank).code == "out_of_memory"
    assert model.loras.applied == ()
    return hash_weights(model, world)


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    world = join(read_launch(), device_kind="cpu")
    files = check_model_folder(load_profile(cases["profile"]), Path(cases["folder"]))
    frames, hashes, kept = {}, {}, {}
    for dtype in ("float32", "bfloat16"):
        model = load_model(files, world=world, dtype=dtype)
        hashes[f"{dtype} before"] = hash_weights(model, world)
        for case in cases["cases"]:
            command = world.broadcast_command(Generate(plan_of(case, cases["arguments"])) if world.rank == 0 else None)
            assert isinstance(command, Generate)
            made = None
            if dtype == "float32":
                plan = replace(command.plan, **asdict(model.degrees_for(command.plan, world, PinnedDegrees())))
                made = generate_frames(
                    plan, model, world, progress=lambda *_: None, decide=lambda: Stop.NO, quantised=False
                )
            else:
                model.loras.set(command.plan.loras)
            hashes[f"{dtype} {case['name']}"] = hash_weights(model, world)
            if made is not None:
                frames[case["name"]] = made.contiguous()
        model.loras.set(())
        hashes[f"{dtype} after"] = hash_weights(model, world)
        hashes[f"{dtype} failed"] = fail_on_the_last_rank(model, world, plan_of(cases["cases"][1], cases["arguments"]))
        hashes[f"{dtype} unread"] = fail_to_read(model, world, plan_of(cases["cases"][1], cases["arguments"]))
        hashes[f"{dtype} every"], kept[dtype] = put_into_every_layer(model, world, Path(f"{sys.argv[2]}.{dtype}"))
    if world.rank == 0:
        Path(sys.argv[2] + ".kept.json").write_text(json.dumps(kept))
        save_file(frames, sys.argv[2])
        Path(sys.argv[2] + ".json").write_text(json.dumps(hashes))
    world.leave()


if __name__ == "__main__":
    main()
