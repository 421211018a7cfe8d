"""What the benchmark compares: plain DiffSynth, its own USP, and ours in every split, over the same weights.

Owns the transformers (the profile's real shape with random weights made on the device, or a real folder's), one for
each way to run its modules, and the loops around them. Leaves out timing and reporting (`parallel.bench`).
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffsynth.configs import MODEL_CONFIGS
from diffsynth.diffusion import FlowMatchScheduler
from diffsynth.models import wan_video_dit
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.pipelines.wan_video import model_fn_wan_video
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel.denoise import Guidance, denoise
from parallel.forward import prepare_dit, shape_of
from parallel.groups import SOLO, SplitGroups
from parallel.profile import load_profile
from parallel.rope import RopeTables
from parallel.sharding import common_root, shard_blocks
from parallel.split import ParallelDegrees, possible_degrees
from parallel.step_cache import StepCache
from parallel.tiny_registry import register_tiny_models
from parallel.usp_reference import enable_usp, usp_model_fn
from parallel.world import World

CFG_SCALE = 5.0
# What DiffSynth's Wan code takes, where it is, before torch's own attention.
_ADDED_KERNELS = ("FLASH_ATTN_3_AVAILABLE", "FLASH_ATTN_2_AVAILABLE", "SAGE_ATTN_AVAILABLE")
ALONE = SplitGroups(ParallelDegrees(), SOLO, SOLO, SOLO, SOLO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is generated: a shape in pixels and frames, and whether there is a negative branch.

    `vae_factor`: pixels to a latent, along a side.
    """

    height: int
    width: int
    num_frames: int
    guided: bool = True
    vae_factor: int = 8

    @property
    def num_tokens(self) -> int:
        token = 2 * self.vae_factor
        return ((self.num_frames - 1) // 4 + 1) * (self.height // token) * (self.width // token)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to generate. run(steps) -> latents, called by every rank; `ranks` is how many of them work."""

    name: str
    ranks: int
    run: Callable[[int], Tensor]
    degrees: ParallelDegrees | None = None


def random_dit(profile_name: str, world: World, dtype: torch.dtype, *, sharded: bool = False) -> Any:
    """The profile's first transformer in its real shape, with random weights: the same ones however it is spread.

    Raises ValueError for a profile whose transformer is no plain WanModel.
    """
    register_tiny_models()
    profile = load_profile(profile_name)
    part = next(part for part in profile.parts if part.role.startswith("dit"))
    config = next(config for config in MODEL_CONFIGS if config["model_hash"] == part.model_hash)
    if not config["model_class"].endswith(".WanModel"):
        raise ValueError(f"{profile_name}: its transformer is a {config['model_class']}, not a WanModel")
    arguments = config.get("extra_kwargs", {})
    with torch.device("meta"):
        dit = WanModel(**arguments).to(dtype).eval().requires_grad_(False)
    if sharded:
        shard_blocks(list(dit.blocks), world)
        common_root(dit.blocks, world)
    for name, parameter in dit.named_parameters():
        if parameter.is_meta:
            _replace(dit, name, torch.empty_like(parameter, device=world.device))
    dit.freqs = WanModel(**{**arguments, "num_layers": 0, "ffn_dim": 8}).freqs
    torch.manual_seed(0)
    for name, parameter in dit.named_parameters():
        _fill(name, parameter)
    return dit


def _replace(module: torch.nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, torch.nn.Parameter(tensor, requires_grad=False))


def _fill(name: str, parameter: Tensor) -> None:
    """Random numbers of the size that training gives, so that neither softmax nor bfloat16 saturates."""
    if isinstance(parameter, DTensor):
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        _fill(name, whole)
        spread = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(spread.to_local())
    elif name.endswith(("norm3.weight", "norm_q.weight", "norm_k.weight")):
        parameter.fill_(1)
    else:
        parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02)


def sharing(dit: Any) -> Any:
    """A second transformer over the same weights, for a variant that changes how its modules run."""
    return copy.deepcopy(dit, {id(tensor): tensor for tensor in (*dit.parameters(), *dit.buffers())})


def resident_variants(dit: Any, case: Case, world: World, *, compiled: bool) -> Iterator[Variant]:
    """Plain DiffSynth, its USP, and ours on one rank and in every split, eager and (with `compiled`) compiled."""

    def plain(steps: int) -> Tensor:
        return diffsynth_loop(dit, case, steps, model_fn_wan_video)

    yield Variant("diffsynth", 1, plain)
    if any(getattr(wan_video_dit, name) for name in _ADDED_KERNELS):
        yield Variant("diffsynth-sdpa", 1, without_added_kernels()(plain))
    if world.world_size > 1:
        usp = sharing(dit)
        enable_usp(usp, world)
        yield Variant("diffsynth-usp", world.world_size, lambda steps: diffsynth_loop(usp, case, steps, usp_model_fn))
    yield from our_variants(sharing(dit), "ours", case, world, compiled=False)
    if compiled:
        yield from our_variants(sharing(dit), "ours-compiled", case, world, compiled=True)


@contextlib.contextmanager
def without_added_kernels() -> Iterator[None]:
    """DiffSynth's Wan attention by torch's own kernels, as where nothing else is installed; those also take float32."""
    found = {name: getattr(wan_video_dit, name) for name in _ADDED_KERNELS}
    try:
        for name in found:
            setattr(wan_video_dit, name, False)
        yield
    finally:
        for name, value in found.items():
            setattr(wan_video_dit, name, value)


def our_variants(
    dit: Any, label: str, case: Case, world: World, *, compiled: bool, sharded: bool = False
) -> Iterator[Variant]:
    """Ours over `dit`, which is prepared for it: on one rank, unless its weights are sharded, and in every split."""
    prepare_dit(dit, compile_blocks=compiled)
    if not sharded:
        yield Variant(f"{label} 1 rank", 1, lambda steps: our_loop(dit, case, world, steps, ALONE))
    if world.world_size == 1:
        return
    heads = shape_of(dit).num_heads
    for degrees in possible_degrees(world_size=world.world_size, num_heads=heads, guided=case.guided):
        groups = world.groups.groups_of(degrees)

        def run(steps: int, groups: SplitGroups = groups) -> Tensor:
            return our_loop(dit, case, world, steps, groups)

        yield Variant(f"{label} {split_name(degrees)}", world.world_size, run, degrees)


def split_name(degrees: ParallelDegrees) -> str:
    """As it stands in a variant's name."""
    return f"cfg{degrees.cfg_degree} ulysses{degrees.ulysses_degree} ring{degrees.ring_degree}"


def _inputs(dit: Any, case: Case) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """shared, positive and negative conditions: random, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    like = dit.patch_embedding.weight

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(like)

    channels = dit.head.head.out_features // 4
    size = (case.height // case.vae_factor, case.width // case.vae_factor)
    latents = (1, channels, (case.num_frames - 1) // 4 + 1, *size)
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
def diffsynth_loop(dit: Any, case: Case, steps: int, model_fn: Callable[..., Tensor]) -> Tensor:
    """The loop of `WanVideoPipeline.__call__` (2.1.12)."""
    shared, positive, negative = _inputs(dit, case)
    latents, scheduler = shared.pop("latents"), _scheduler(steps)
    for value in scheduler.timesteps:
        timestep = value.unsqueeze(0).to(latents)
        predicted = model_fn(dit=dit, latents=latents, timestep=timestep, **shared, **positive)
        if case.guided:
            against = model_fn(dit=dit, latents=latents, timestep=timestep, **shared, **negative)
            predicted = against + CFG_SCALE * (predicted - against)
        latents = scheduler.step(predicted, value, latents)
    result: Tensor = latents
    return result


_TABLES: dict[torch.device, RopeTables] = {}  # as a daemon does, kept from job to job


@torch.no_grad()
def our_loop(dit: Any, case: Case, world: World, steps: int, groups: SplitGroups) -> Tensor:
    """`parallel.denoise.denoise` over the transformer alone. Called by every rank of the split."""
    shared, positive, negative = _inputs(dit, case)
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
        in_iteration_models=("dit",),
        in_iteration_models_2=("dit2",),
        load_models_to_device=lambda _names: None,
    )
    return denoise(
        pipeline,
        shared=shared,
        positive=positive,
        negative=negative,
        guidance=Guidance(cfg_scale=CFG_SCALE if case.guided else 1.0, switch_boundary=0.875),
        world=world,
        groups=groups,
        tables=_TABLES.setdefault(world.device, RopeTables(world.device)),
        before_step=lambda _step: None,
        step_cache=StepCache((False,) * steps),
    )
