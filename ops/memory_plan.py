"""`reeld plan`: the memory of each rank, part by part, before anything loads.

Owns the choice of what is planned and its two forms, a table and JSON. Leaves out the arithmetic (`parallel.memory`).
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from daemon.config import load_config
from ops.failure import UsageError
from parallel.memory import DTYPE_BYTES, JobShape, predict_memory, weight_bytes
from parallel.profile import ModelFolderError, ModelProfile, check_model_folder, load_profile
from parallel.sizes import ModelSizes, read_sizes, sizes_of
from parallel.split import CPU, CUDA, DitShape, ParallelDegrees, PinnedDegrees, choose_degrees
from parallel.strategy import MemorySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to plan; None takes the profile's default. `folder` None: the layouts come from DiffSynth's own classes.

    `others`: folders of the models that are loaded beside it, by profile. `assumed`: choices that nobody made.
    `lora_cache_bytes`: None where jobs have no LoRAs to ask for.
    """

    profile: str
    folder: Path | None
    ranks: int
    memory: MemorySettings
    dtype: str
    pinned: PinnedDegrees
    device: str
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    cfg_scale: float | None = None
    tiled: bool = False
    gpu_memory_gib: float | None = None
    lora_cache_bytes: int | None = None
    others: dict[str, Path] = field(default_factory=dict)
    assumed: dict[str, str | int] = field(default_factory=dict)


def asked(
    config_path: Path | None,
    *,
    profile: str | None,
    folder: Path | None,
    ranks: int | None,
    memory: str | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    cfg_scale: float | None,
    dtype: str | None,
    gpu_memory_gib: float | None,
) -> Asked:
    """What the options ask for, over what the configuration says. Raises UsageError, and ConfigError."""
    config = load_config(config_path) if profile is None or config_path is not None else None
    models = {} if config is None else {model.profile: model.path for model in config.models}
    assumed: dict[str, str | int] = {}
    if profile is None:
        profile = next(iter(models))
        if len(models) > 1:
            assumed["profile"] = profile
    others = {name: path for name, path in models.items() if name != profile} if profile in models else {}
    device = "cpu" if config is not None and config.device == "cpu" else "cuda"
    configured = None if config is None or config.nproc_per_node == "auto" else config.nproc_per_node
    if ranks is None and configured is None and device == "cuda":
        assumed["ranks"] = 1
    strategy = memory or (config.memory if config is not None else "resident")
    chosen_dtype = dtype or (config.dtype if config is not None else "bfloat16")
    if chosen_dtype not in DTYPE_BYTES:
        raise UsageError(f"--dtype: give one of {', '.join(DTYPE_BYTES)}")
    limit = config.vram_limit_gib if config is not None and strategy == "vram_limit" else None
    if gpu_memory_gib is None and config is not None:
        gpu_memory_gib = config.memory_limit_gib
    return Asked(
        profile=profile,
        folder=folder or models.get(profile),
        ranks=ranks or configured or 1,
        memory=MemorySettings(strategy, limit),
        dtype=chosen_dtype,
        pinned=config.parallel.pinned() if config is not None else PinnedDegrees(),
        device=device,
        height=height,
        width=width,
        num_frames=num_frames,
        cfg_scale=cfg_scale,
        tiled=config is not None and config.parallel.vae == "tiled",
        gpu_memory_gib=gpu_memory_gib,
        lora_cache_bytes=config.lora_cache_bytes if config is not None and config.loras else None,
        others=others,
        assumed=assumed,
    )


def plan(asked: Asked) -> dict[str, Any]:
    """The prediction as a JSON object. Raises UsageError for a shape, split or strategy that cannot work."""
    try:
        profile = load_profile(asked.profile)
        asked.memory.check(world_size=asked.ranks)
        sizes = _sizes(profile, asked.folder)
        shape = _shape(profile, asked)
        degrees = _degrees(sizes, shape, asked)
        others = sum(_resting_bytes(name, path, asked) for name, path in asked.others.items())
    except (ValueError, ModelFolderError) as error:
        raise UsageError(str(error)) from error
    ranks = predict_memory(
        sizes,
        shape,
        degrees=degrees,
        dtype=asked.dtype,
        memory=asked.memory,
        on_gpu=asked.device == "cuda",
        other_weights=others,
        lora_cache_bytes=asked.lora_cache_bytes,
    )
    largest = max(rank.total for rank in ranks)
    found: dict[str, Any] = {
        "profile": profile.name,
        "shape": asdict(shape),
        "degrees": asdict(degrees),
        "memory": asked.memory.strategy,
        "dtype": asked.dtype,
        "ranks": [asdict(rank) | {"fullest_phase": rank.fullest_phase, "total": rank.total} for rank in ranks],
        "largest_total": largest,
        "assumed": asked.assumed
        | {name: getattr(shape, name) for name in ("height", "width", "num_frames") if getattr(asked, name) is None},
    }
    if asked.gpu_memory_gib is not None:
        found["gpu_memory_gib"] = asked.gpu_memory_gib
        found["fits"] = largest <= asked.gpu_memory_gib * 2**30
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The prediction for people: a column for each rank, GiB; what is at most in use at once counts for the total."""
    shape, degrees, ranks = found["shape"], found["degrees"], found["ranks"]
    split = f"{degrees['cfg_degree']} x {degrees['ulysses_degree']} x {degrees['ring_degree']}"
    lines = [
        f"{found['profile']}: {shape['width']}x{shape['height']}, {shape['num_frames']} frames, {found['dtype']}, "
        f"memory {found['memory']}, {len(ranks)} rank(s) as CFG x Ulysses x ring {split}",
    ]
    if found["assumed"]:
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in found["assumed"].items())
        lines.append(f"assumed: {options} (give them to plan another job)")
    lines += ["", _row("GiB", [f"rank {rank['rank']}" for rank in ranks])]
    for title in ("weights", "encode_text", "encode_frames", "denoise", "decode", "overhead", "host"):
        parts: list[dict[str, int]] = [rank.get(title) or rank["phases"].get(title, {}) for rank in ranks]
        names = list(dict.fromkeys(name for each in parts for name in each))
        if names:
            lines.append(_row(title, [_gib(sum(each.values())) for each in parts]))
            lines += [_row(f"  {name}", [_gib(each.get(name, 0)) for each in parts]) for name in names]
    lines.append(_row("total", [_gib(rank["total"]) for rank in ranks]))
    lines.append(_row("fullest in", [rank["fullest_phase"] for rank in ranks]))
    if "fits" in found:
        verdict = f"{'fits' if found['fits'] else 'does not fit'} into {found['gpu_memory_gib']:g} GiB"
    else:
        verdict = "no verdict: give --gpu-memory, or set memory_limit_gib"
    return [*lines, "", verdict]


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<24}" + "".join(f"{cell:>14}" for cell in cells)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f}"


def _sizes(profile: ModelProfile, folder: Path | None) -> ModelSizes:
    if folder is not None:
        return read_sizes(check_model_folder(profile, folder))
    from parallel.parts import layout_of  # needs torch, which takes seconds to start

    return sizes_of(profile, {part.role: layout_of(part) for part in profile.parts})


def _resting_bytes(profile: str, folder: Path, asked: Asked) -> int:
    """What a model takes of each device while another one works, as `daemon.admission` counts it."""
    stay, _ = weight_bytes(
        _sizes(load_profile(profile), folder),
        rank=0,
        world_size=asked.ranks,
        element=DTYPE_BYTES[asked.dtype],
        memory=asked.memory,
    )
    return sum(stay.values())


def _shape(profile: ModelProfile, asked: Asked) -> JobShape:
    defaults = profile.defaults
    height, width = asked.height or defaults.height, asked.width or defaults.width
    frames = asked.num_frames or defaults.num_frames
    return JobShape(
        height=-(-height // profile.height_multiple) * profile.height_multiple,
        width=-(-width // profile.width_multiple) * profile.width_multiple,
        num_frames=-(-(frames - 1) // 4) * 4 + 1,
        guided=(defaults.cfg_scale if asked.cfg_scale is None else asked.cfg_scale) != 1.0,
        tiled=asked.tiled,
        frame_inputs=any(task != "text_to_video" for task in profile.tasks),
    )


def _degrees(sizes: ModelSizes, shape: JobShape, asked: Asked) -> ParallelDegrees:
    area = (shape.height // sizes.vae.factor) * (shape.width // sizes.vae.factor)
    dit = next(part for part in sizes.parts if part.name == "dit")
    return choose_degrees(
        world_size=asked.ranks,
        shape=DitShape(
            dim=sizes.dit.dim,
            ffn_dim=sizes.dit.ffn_dim,
            num_heads=sizes.dit.num_heads,
            num_layers=len(dit.blocks),
        ),
        num_tokens=shape.latent_frames * area // 4,
        guided=shape.guided,
        machine=CUDA if asked.device == "cuda" else CPU,
        pinned=asked.pinned,
    )
