"""Seconds a denoising step: plain DiffSynth, its own USP, and ours in every split, side by side in one run.

Run on every rank: `torchrun --nproc-per-node N -m parallel.bench --profile wan2.1-t2v-14b --output result.json`. The
transformer has the profile's real shape and random weights made on the device; conditions and latents are random, and
the same on every rank. All variants run one after the other over the same weights, so that what differs is the code.
Text encoder and VAE take no part. Leaves out rendering (`ops.bench`).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffsynth.configs import MODEL_CONFIGS
from diffsynth.diffusion import FlowMatchScheduler
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.pipelines.wan_video import model_fn_wan_video
from torch import Tensor

from parallel.denoise import Guidance, denoise
from parallel.forward import prepare_dit, shape_of
from parallel.groups import SOLO, SplitGroups
from parallel.profile import load_profile
from parallel.rope import RopeTables
from parallel.split import CPU, CUDA, ParallelDegrees, choose_degrees, possible_degrees, step_flops
from parallel.step_cache import StepCache
from parallel.tiny_registry import register_tiny_models
from parallel.usp_reference import enable_usp, usp_model_fn
from parallel.world import World, join, read_launch

CFG_SCALE = 5.0
_ALONE = SplitGroups(ParallelDegrees(), SOLO, SOLO, SOLO, SOLO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is generated: a shape in pixels and frames, and how many steps are timed after one to warm up."""

    height: int
    width: int
    num_frames: int
    steps: int


def main() -> None:
    options = _options()
    world = join(read_launch(), device_kind=options.device)
    dtype = getattr(torch, options.dtype)
    dit = random_dit(options.profile, world.device, dtype)
    shape = shape_of(dit)
    report: dict[str, Any] = {
        "profile": options.profile,
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": options.dtype,
        "matmul_tflops": matmul_tflops(world.device, dtype),
        "weights_gib": round(sum(p.numel() * p.element_size() for p in dit.parameters()) / 2**30, 2),
        "results": [],
    }
    for height, width, num_frames in options.shape:
        case = Case(height=height, width=width, num_frames=num_frames, steps=options.steps)
        tokens = ((num_frames - 1) // 4 + 1) * (height // 16) * (width // 16)
        flops = 2 * step_flops(shape, tokens)
        reference: Tensor | None = None
        chosen = choose_degrees(
            world_size=world.world_size,
            shape=shape,
            num_tokens=tokens,
            guided=True,
            machine=CUDA if world.device.type == "cuda" else CPU,
        )
        for name, ranks, run in variants(dit, case, world, options):
            if options.only and not any(name.startswith(prefix) for prefix in options.only):
                continue
            row: dict[str, Any] = {"variant": name, "shape": [height, width, num_frames], "tokens": tokens}
            try:
                row |= measure(run, case, world, alone=ranks == 1)
            except (RuntimeError, ValueError, ImportError, AssertionError, AttributeError, TypeError) as error:
                row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            latents = row.pop("latents", None)
            if "seconds_per_step" in row:
                row["tflops_per_card"] = round(flops / row["seconds_per_step"] / ranks / 1e12, 2)
                if name == "diffsynth":
                    reference = latents
                elif reference is not None and latents is not None:
                    row["relative_error"] = float((latents - reference).norm() / reference.norm())
            row["chosen"] = name.startswith("ours") and name.endswith(_split_name(chosen))
            report["results"].append(row)
            if world.rank == 0:
                print(json.dumps(row), flush=True)
                Path(options.output).write_text(json.dumps(report, indent=1))
    world.leave()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="wan2.1-t2v-1.3b")
    parser.add_argument("--shape", type=_shape, nargs="+", default=[(480, 832, 81)], help="HEIGHTxWIDTHxFRAMES")
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one to warm up")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", help="prefixes of the variants to run")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile of the blocks")
    parser.add_argument("--output", required=True)
    return parser.parse_args()


def _shape(text: str) -> tuple[int, int, int]:
    height, width, num_frames = (int(part) for part in text.split("x"))
    return height, width, num_frames


def random_dit(profile_name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The profile's first transformer in its real shape, with the same random weights on every rank.

    Raises ValueError for a profile whose transformer is no plain WanModel.
    """
    register_tiny_models()
    profile = load_profile(profile_name)
    part = next(part for part in profile.parts if part.role.startswith("dit"))
    config = next(config for config in MODEL_CONFIGS if config["model_hash"] == part.model_hash)
    if not config["model_class"].endswith(".WanModel"):
        raise ValueError(f"{profile_name}: its transformer is a {config['model_class']}, not a WanModel")
    with torch.device("meta"):
        dit = WanModel(**config.get("extra_kwargs", {}))
    dit.freqs = WanModel(**{**config.get("extra_kwargs", {}), "num_layers": 0, "ffn_dim": 8}).freqs
    dit = dit.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in dit.named_parameters():
        if name.endswith(("norm3.weight", "norm_q.weight", "norm_k.weight")):
            parameter.fill_(1)
        else:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter.normal_(std=fan_in**-0.5 if parameter.ndim > 1 else 0.02)
    return dit


def variants(
    dit: Any, case: Case, world: World, options: argparse.Namespace
) -> Iterator[tuple[str, int, Callable[[int], Tensor]]]:
    """Name, ranks at work and run(steps) -> latents of each variant, in the order in which they are run."""
    yield "diffsynth", 1, lambda steps: _diffsynth_loop(dit, case, world, steps, model_fn_wan_video)
    if world.world_size > 1:
        enable_usp(dit, world)
        yield "diffsynth-usp", world.world_size, lambda steps: _diffsynth_loop(dit, case, world, steps, usp_model_fn)
    for compiled in (False, True) if options.compile else (False,):
        prepare_dit(dit, compile_blocks=compiled)
        label = "ours-compiled" if compiled else "ours"
        yield f"{label} 1 rank", 1, lambda steps: _our_loop(dit, case, world, steps, _ALONE)
        if world.world_size == 1:
            continue
        for degrees in possible_degrees(world_size=world.world_size, num_heads=shape_of(dit).num_heads, guided=True):
            groups = world.groups.groups_of(degrees)

            def run(steps: int, groups: SplitGroups = groups) -> Tensor:
                return _our_loop(dit, case, world, steps, groups)

            yield f"{label} {_split_name(degrees)}", world.world_size, run


def _split_name(degrees: ParallelDegrees) -> str:
    return f"cfg{degrees.cfg_degree} ulysses{degrees.ulysses_degree} ring{degrees.ring_degree}"


def _inputs(dit: Any, case: Case, world: World) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """shared, positive and negative conditions: random, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    like = dit.patch_embedding.weight

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(like)

    channels = dit.head.head.out_features // 4
    latents = (1, channels, (case.num_frames - 1) // 4 + 1, case.height // 8, case.width // 8)
    shared: dict[str, Any] = {"latents": draw(*latents)}
    if dit.in_dim > channels:
        shared["y"] = draw(1, dit.in_dim - channels, *latents[2:])
    if dit.has_image_input:
        shared["clip_feature"] = draw(1, 257, 1280)
    text_dim = dit.text_embedding[0].in_features
    return shared, {"context": draw(1, 512, text_dim)}, {"context": draw(1, 512, text_dim)}


def _scheduler(steps: int) -> FlowMatchScheduler:
    scheduler = FlowMatchScheduler("Wan")
    scheduler.set_timesteps(50, shift=5.0)
    scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[:steps], scheduler.sigmas[: steps + 1]
    return scheduler


@torch.no_grad()
def _diffsynth_loop(dit: Any, case: Case, world: World, steps: int, model_fn: Callable[..., Tensor]) -> Tensor:
    """The loop of `WanVideoPipeline.__call__` (2.1.12)."""
    shared, positive, negative = _inputs(dit, case, world)
    latents, scheduler = shared.pop("latents"), _scheduler(steps)
    for value in scheduler.timesteps:
        timestep = value.unsqueeze(0).to(latents)
        predicted = model_fn(dit=dit, latents=latents, timestep=timestep, **shared, **positive)
        against = model_fn(dit=dit, latents=latents, timestep=timestep, **shared, **negative)
        latents = scheduler.step(against + CFG_SCALE * (predicted - against), value, latents)
    result: Tensor = latents
    return result


@torch.no_grad()
def _our_loop(dit: Any, case: Case, world: World, steps: int, groups: SplitGroups) -> Tensor:
    shared, positive, negative = _inputs(dit, case, world)
    if groups.degrees.world_size < world.world_size:  # one rank at work, the others look on: a world of its own
        world = World(replace(world.launch, world_size=1), world.device, dist.HashStore(), None)
    pipeline = SimpleNamespace(
        dit=dit,
        dit2=None,
        vace=None,
        vace2=None,
        motion_controller=None,
        scheduler=_scheduler(steps),
        torch_dtype=dit.patch_embedding.weight.dtype,
    )
    return denoise(
        pipeline,
        shared=shared,
        positive=positive,
        negative=negative,
        guidance=Guidance(cfg_scale=CFG_SCALE, switch_boundary=0.875),
        world=world,
        groups=groups,
        tables=RopeTables(world.device),
        before_step=lambda step: None,
        step_cache=StepCache((False,) * steps),
    )


def measure(run: Callable[[int], Tensor], case: Case, world: World, *, alone: bool) -> dict[str, Any]:
    """Called by every rank. Times `case.steps` steps after one to warm up; with `alone` the other ranks look on."""
    result: dict[str, Any] = {}
    if not alone or world.rank == 0:
        begun = time.perf_counter()
        run(1)
        _synchronise(world.device)
        result["first_step_seconds"] = round(time.perf_counter() - begun, 3)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        repeats = []
        for _ in range(1 if world.device.type == "cuda" else 3):
            begun = time.perf_counter()
            latents = run(case.steps)
            _synchronise(world.device)
            repeats.append((time.perf_counter() - begun) / case.steps)
        result["seconds_per_step"] = round(statistics.median(repeats), 4)
        result["latents"] = latents.float().cpu()
        if world.device.type == "cuda":
            result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(world.device) / 2**30, 2)
    world.all_true(True)  # over gloo: who waits here does not hold the device
    return result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The measured peak of a square matrix product, in TFLOP/s: what no step can beat."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        begun = time.perf_counter()
        for _ in range(4):
            a @ b
        _synchronise(device)
        seconds.append((time.perf_counter() - begun) / 4)
    return round(2 * size**3 / min(seconds) / 1e12, 3)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
