"""Prepares conditions on two ranks and reports what each holds: -m tests.distributed.conditions_ranks MODELS FOLDER

Writes `FOLDER/rank-N.json`. Rank 0 also records what DiffSynth's own `__call__` gives its model function.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from diffsynth.pipelines.wan_video import WanVideoPipeline
from PIL import Image

from parallel.conditions import Conditions, PromptCache, prepare_conditions
from parallel.groups import GroupTable
from parallel.model import load_model
from parallel.outcome import outcome_of
from parallel.plan import Shutdown
from parallel.profile import check_model_folder, load_profile
from parallel.split import ParallelDegrees
from parallel.world import COALESCED_BYTES, World, join, read_launch
from tests.distributed.forked import run_ranks

SHAPE = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 4}
PROMPTS = {"prompt": "a red fox runs through snow", "negative_prompt": "blurry"}


class Recorded(Exception):  # noqa: N818  ends DiffSynth's call before its first step; no error
    """Carries what the model function was given."""


def main() -> None:
    models, folder = Path(sys.argv[1]), Path(sys.argv[2])
    world = join(read_launch(), device_kind="cpu")
    report: dict[str, Any] = {}
    image = Image.linear_gradient("L").convert("RGB") if world.rank == 0 else None
    video = [image.resize((96, 64))] * 9 if image else None
    for name, model, dtype, arguments in (
        ("text", "tiny-t2v", "float32", PROMPTS | SHAPE),
        ("text-bfloat16", "tiny-t2v", "bfloat16", PROMPTS | SHAPE),
        ("no-guidance", "tiny-t2v", "float32", PROMPTS | SHAPE | {"cfg_scale": 1.0}),
        ("image", "tiny-i2v", "float32", PROMPTS | SHAPE | {"input_image": image, "end_image": image}),
        ("video", "tiny-t2v", "float32", PROMPTS | SHAPE | {"input_video": video, "denoising_strength": 0.6}),
    ):
        pipeline = load(models, model, dtype, world)
        cache = PromptCache()
        given = arguments | {"seed": 5} if world.rank == 0 else {}
        made = prepare_conditions(pipeline, functools.partial(dict, given), world, prompts=cache, share_vae=False)
        report[name] = digests(made) | {"timesteps": pipeline.scheduler.timesteps.tolist()}
        if world.rank == 0:
            report[f"{name}-expected"] = digests_of_calls(record(pipeline, given))
            report[f"{name}-expected"]["timesteps"] = pipeline.scheduler.timesteps.tolist()
    shared: tuple[tuple[str, dict[str, Any]], ...] = (
        ("whole", PROMPTS | SHAPE | {"input_image": image, "tiled": False}),
        ("tiled", PROMPTS | SHAPE | {"input_image": image, "tile_size": (5, 7), "tile_stride": (3, 4)}),
    )
    for name, changed in shared:
        pipeline = load(models, "tiny-i2v", "float32", world, keep_vae=True)
        given = changed | {"seed": 5} if world.rank == 0 else {}
        made = prepare_conditions(pipeline, functools.partial(dict, given), world, prompts=PromptCache())
        report[name] = digests(made)
        if world.rank == 0:
            expected = record(pipeline, given)[0]["y"]
            report[f"{name}-error"] = float((made.shared["y"] - expected).abs().max())
            report[f"{name}-scale"] = float(expected.abs().max())
    report["tensors"] = broadcast(world)
    report["encoder_runs"] = encoder_runs(models, world)
    report["failures"] = failures(models, world)
    table = GroupTable(world_size=2, local_rank=world.rank, backend="gloo", timeout=timedelta(minutes=7))
    ulysses = table.groups_of(ParallelDegrees(ulysses_degree=2)).ulysses.handle
    report["timeout"] = ulysses._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(report))
    world.broadcast_command(Shutdown("done") if world.rank == 0 else None)
    world.leave()


@functools.cache
def load(models: Path, name: str, dtype: str, world: World, *, keep_vae: bool = False) -> WanVideoPipeline:
    """The pipeline, on the peers without what they must not need."""
    model = load_model(check_model_folder(load_profile(name), models / name), world=world, dtype=dtype)
    if world.rank != 0:
        for part in ("text_encoder", "image_encoder", "tokenizer", *(() if keep_vae else ("vae",))):
            setattr(model.pipeline, part, None)
    return model.pipeline


def digests(conditions: Conditions) -> dict[str, Any]:
    branches = {"shared": conditions.shared, "positive": conditions.positive, "negative": conditions.negative}
    return {f"{branch}.{name}": digest(value) for branch, held in branches.items() for name, value in held.items()}


def digest(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    bits = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(value.dtype), list(value.shape), hashlib.sha256(bits).hexdigest()]


def record(pipeline: WanVideoPipeline, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What plain DiffSynth gives its model function in the first step, for each branch."""
    calls: list[dict[str, Any]] = []

    def model_fn(**inputs: Any) -> torch.Tensor:
        calls.append(inputs)
        if len(calls) == (1 if arguments.get("cfg_scale") == 1.0 else 2):
            raise Recorded
        return torch.zeros_like(inputs["latents"])

    own, pipeline.model_fn = pipeline.model_fn, model_fn
    try:
        pipeline(**arguments, progress_bar_cmd=lambda timesteps: timesteps)
    except Recorded:
        pass
    finally:
        pipeline.model_fn = own
    return calls


def digests_of_calls(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"{branch}.{name}": digest(value)
        for branch, call in zip(("positive", "negative"), calls, strict=False)
        for name, value in call.items()
        if isinstance(value, torch.Tensor)
    }


def broadcast(world: World) -> list[Any]:
    """Tensors of many kinds after they were broadcast: one too large to travel with the others, and odd ones."""
    torch.manual_seed(world.rank)
    tensors = [
        torch.randn(COALESCED_BYTES // 4 + 1),
        torch.randn(3, 5).to(torch.bfloat16),
        torch.randn(7) > 0,
        torch.randint(100, ()),
        torch.empty(0, 4),
        torch.randn(2, 2, dtype=torch.float64),
    ]
    world.broadcast_tensors(tensors)
    return [digest(tensor) for tensor in tensors]


def encoder_runs(models: Path, world: World) -> list[int]:
    """How often the text encoder has run after each of these jobs."""
    pipeline = load(models, "tiny-t2v", "float32", world)
    runs: list[int] = []
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    if world.rank == 0:
        pipeline.text_encoder.register_forward_hook(counted)
    cache = PromptCache(capacity=3)
    for prompt, negative, cfg_scale in (
        ("a cat", "blurry", 1.0),  # 1 run: without guidance there is no negative prompt
        ("a dog", "blurry", 5.0),  # 2 more
        ("a dog", "blurry", 5.0),  # the same bits, and no run
        ("a horse", "blurry", 5.0),  # 1 more, and the cat is forgotten
        ("a cat", "blurry", 5.0),  # 1 more
    ):
        arguments = SHAPE | {"prompt": prompt, "negative_prompt": negative, "cfg_scale": cfg_scale, "seed": 5}
        prepare_conditions(pipeline, functools.partial(dict, arguments), world, prompts=cache, share_vae=False)
        runs.append(count)
    return runs


def failures(models: Path, world: World) -> list[Any]:
    """Each rank's outcome when rank 0 fails while preparing, and that the ranks still understand each other."""
    pipeline = load(models, "tiny-i2v", "float32", world)
    outcomes: list[Any] = []
    good = PROMPTS | SHAPE | {"seed": 5}

    def unopened() -> dict[str, Any]:
        raise MemoryError("no room for the frames")

    bad: list[Callable[[], Mapping[str, Any]]]
    bad = [functools.partial(dict, good | each) for each in ({"input_image": "no image"}, {"seed": "many"}, {"no": 1})]
    for arguments in [*bad, unopened]:
        try:
            prepare_conditions(pipeline, arguments, world, prompts=PromptCache(), share_vae=False)
        except Exception as error:  # noqa: BLE001  whatever it is, is the subject
            outcome = outcome_of(error, world.rank)
            outcomes.append([outcome.code, outcome.message])
    made = prepare_conditions(pipeline, lambda: good, world, prompts=PromptCache(), share_vae=False)
    return [*outcomes, digest(made.shared["latents"])]


if __name__ == "__main__":
    run_ranks(2, main)
