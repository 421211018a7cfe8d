"""How much memory a job will take on each rank, part by part, before anything is loaded.

Owns the arithmetic: weights from the headers of the files, and for each phase of a job (encode, denoise, decode) what
is alive when that phase is at its fullest. The formulas count tensors that the code holds at that point, per token or
per pixel; a test measures them. Compiled blocks keep less, so on a GPU the prediction is an upper bound. Pure Python.
Leaves out what the sizes are read from (`sizes.py`) and showing it (`ops.memory_plan`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from parallel.sizes import ModelSizes
from parallel.split import ParallelDegrees
from parallel.strategy import MemorySettings

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
TEXT_TOKENS = 512
IMAGE_TOKENS = 257
# DiffSynth's default tile, in latent rows and columns (`tile_size` of `WanVideoPipeline.__call__`).
_TILE = (30, 52)
# On a GPU only. The context and its kernels, one NCCL communicator's buffers, and what the caching allocator holds
# beyond what is in use: so much for each pixel of each frame (measured with Wan 2.1's VAE at two sizes, on one card and
# on two: docs/memory.md), and at least a share of what comes and goes.
_CONTEXT_BYTES = 600 << 20
_NCCL_BYTES = 400 << 20
_RESERVE_BYTES_PER_PIXEL = 50
_RESERVE_SHARE = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """What of a job decides its memory. `frame_inputs`: whether the VAE also encodes (images, videos). `references`:
    images that are denoised along as latent frames of their own."""

    height: int
    width: int
    num_frames: int
    guided: bool = True
    tiled: bool = False
    step_cache: bool = False
    frame_inputs: bool = False
    references: int = 0

    @property
    def latent_frames(self) -> int:
        """Of what is denoised."""
        return (self.num_frames - 1) // 4 + 1 + self.references


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on one rank's device. `phases` hold what comes and goes; the fullest counts. `host`: beside the device."""

    rank: int
    weights: dict[str, int]
    phases: dict[str, dict[str, int]]
    overhead: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    def phase_total(self, phase: str) -> int:
        """Weights and what the phase needs, without the overhead."""
        return sum(self.weights.values()) + sum(self.phases[phase].values())

    @property
    def fullest_phase(self) -> str:
        return max(self.phases, key=self.phase_total)

    @property
    def total(self) -> int:
        return self.phase_total(self.fullest_phase) + sum(self.overhead.values())


def predict_memory(
    model: ModelSizes,
    shape: JobShape,
    *,
    degrees: ParallelDegrees,
    dtype: str,
    memory: MemorySettings,
    on_gpu: bool,
    other_weights: int = 0,
    lora_cache_bytes: int | None = None,
) -> list[RankMemory]:
    """The prediction for every rank. `other_weights`: bytes of other models that stay on each device.

    `lora_cache_bytes`: how many bytes of LoRAs each rank keeps; None where no job may ask for one.
    """
    world_size = degrees.world_size
    return [
        _predict_rank(
            rank,
            model,
            shape,
            degrees=degrees,
            element=DTYPE_BYTES[dtype],
            memory=memory,
            on_gpu=on_gpu,
            other_weights=other_weights,
            lora_cache_bytes=lora_cache_bytes,
        )
        for rank in range(world_size)
    ]


def weight_bytes(
    model: ModelSizes, *, rank: int, world_size: int, element: int, memory: MemorySettings
) -> tuple[dict[str, int], dict[str, int]]:
    """A rank's weights by part: those that stay on the device, and those that come and go (or wait on the host)."""
    stay: dict[str, int] = {}
    wait: dict[str, int] = {}
    for part in model.parts:
        if part.is_encoder and rank != 0:
            continue
        if part.is_encoder:
            waits = memory.offloads_encoders or memory.strategy == "vram_limit"
            (wait if waits else stay)[part.name] = part.elements * element
        elif part.is_sharded and memory.strategy == "fsdp" and world_size > 1:
            shards = sum(
                math.ceil(tensor[0] / world_size) * math.prod(tensor[1:]) for block in part.blocks for tensor in block
            )
            stay[part.name] = (part.outside_blocks + shards) * element
        elif part.is_dit and memory.strategy == "vram_limit":
            stay[part.name] = (part.elements - part.linear_elements) * element
            wait[part.name] = part.linear_elements * element
        else:
            stay[part.name] = part.elements * element
    return stay, wait


def lora_bytes(model: ModelSizes, *, world_size: int, element: int, memory: MemorySettings) -> dict[str, int]:
    """What each rank keeps on the host of the weights that LoRAs may change, once all of them were: `parallel.lora`."""
    if memory.strategy == "vram_limit":  # where weights are not written to
        return {}
    return {"lora_originals": math.ceil(sum(part.matrices for part in model.parts) / world_size) * element}


def _predict_rank(
    rank: int,
    model: ModelSizes,
    shape: JobShape,
    *,
    degrees: ParallelDegrees,
    element: int,
    memory: MemorySettings,
    on_gpu: bool,
    other_weights: int,
    lora_cache_bytes: int | None,
) -> RankMemory:
    world_size = degrees.world_size
    stay, wait = weight_bytes(model, rank=rank, world_size=world_size, element=element, memory=memory)
    if other_weights:
        stay["other_models"] = other_weights
    phases = {
        "denoise": _denoise(model, shape, degrees, element),
        "decode": _decode(model, shape, world_size, rank, element),
    }
    if rank == 0:
        phases["encode_text"] = _arriving(model, wait, memory, element) | _encode_text(model, element)
    if model.dit.camera_channels:
        phases["denoise_camera"] = _embed_camera(model, shape, element)
    if shape.frame_inputs:
        phases["encode_frames"] = _encode_frames(model, shape, world_size, rank, element)
    if memory.strategy == "fsdp" and world_size > 1:
        # The block at work, the next one as it arrives, and the last one's buffer until its copy is known to be done.
        largest = max(part.largest_block for part in model.parts if part.is_sharded)
        phases["denoise"]["gathered_blocks"] = 3 * largest * element
    if memory.strategy == "vram_limit":
        _fill_up(stay, phases, {part.name: wait.get(part.name, 0) for part in model.parts if part.is_dit}, memory)
    if rank == 0:
        wait["frames"] = 3 * shape.num_frames * shape.height * shape.width
    if lora_cache_bytes is not None:
        wait |= lora_bytes(model, world_size=world_size, element=element, memory=memory)
        wait["lora_cache"] = lora_cache_bytes
    overhead: dict[str, int] = {}
    if on_gpu:
        overhead["cuda_context"] = _CONTEXT_BYTES
        if world_size > 1:
            overhead["nccl"] = _NCCL_BYTES
        fullest = max(sum(phase.values()) for phase in phases.values())
        pixels = shape.num_frames * shape.height * shape.width
        overhead["allocator_reserve"] = max(int(_RESERVE_SHARE * fullest), _RESERVE_BYTES_PER_PIXEL * pixels)
    return RankMemory(rank=rank, weights=stay, phases=phases, overhead=overhead, host=wait)


def _arriving(model: ModelSizes, wait: Mapping[str, int], memory: MemorySettings, element: int) -> dict[str, int]:
    """What comes to the device to encode, of the parts that wait on the host: see `parallel.offload`."""
    found: dict[str, int] = {}
    for part in model.parts:
        if part.is_encoder and part.name in wait:
            streamed = part.blocks and memory.offloads_encoders
            found["streamed_blocks" if streamed else part.name] = (
                2 * part.largest_block * element if streamed else wait[part.name]
            )
    return found


def _fill_up(
    stay: Mapping[str, int], phases: dict[str, dict[str, int]], managed: Mapping[str, int], memory: MemorySettings
) -> None:
    """Managed layers stay on the device as long as it is less full than the limit says; None: always."""
    limit = math.inf if memory.vram_limit_gib is None else memory.vram_limit_gib * 2**30
    room = limit - sum(stay.values()) - sum(phases["denoise"].values())
    phases["denoise"]["managed_layers"] = int(max(0, min(max(managed.values(), default=0), room)))


def _denoise(model: ModelSizes, shape: JobShape, degrees: ParallelDegrees, element: int) -> dict[str, int]:
    """At the fullest point of a DiT block: see `parallel.forward`. One unit is this rank's tokens times the width."""
    dit = model.dit
    tokens = math.ceil(_num_tokens(model, shape) / degrees.sequence_degree)
    unit = tokens * dit.dim * element
    single = tokens * dit.dim * 4  # a unit in float32
    text_tokens = TEXT_TOKENS + (IMAGE_TOKENS if dit.takes_image_tokens else 0)
    # Alive throughout is the block's input, with a step cache the first block's too. Where most is alive beside it:
    # q, k and v, normed and one of them rotated, while the other is rotated in float32;
    rotating = 5 * unit + 3 * single
    # q, k and v as they are sent, as they came, what was attended and what came back of it; alone, without sending;
    exchanging = (8 if degrees.ulysses_degree > 1 else 4) * unit
    # round a ring, q, k and v, a block that is attended and one that arrives, and three partial results in float32;
    ringing = 7 * unit + 3 * single if degrees.ring_degree > 1 else 0
    # and after it, what was attended beside the feed-forward, RMSNorm's copies in float32 or the cross-attention.
    feed_forward = 3 * unit + 2 * tokens * dit.ffn_dim * element
    crossing = 6 * unit + 3 * text_tokens * dit.dim * element
    normalising = 2 * unit + 3 * single
    fullest = max(rotating, exchanging, ringing, feed_forward, crossing, normalising)
    found = {"activations": (2 if shape.step_cache else 1) * unit + fullest}
    branches = 2 if shape.guided and degrees.cfg_degree == 1 else 1
    if shape.step_cache:
        found["step_cache"] = (branches + 1) * unit
    if dit.vace_layers:
        found["vace_hints"] = (dit.vace_layers + 2) * unit
    if dit.camera_channels:
        found["camera"] = _camera_input(model, shape, element) + unit
    latents = model.vae.channels * shape.latent_frames * _latent_area(model, shape) * element
    extra = max(0, dit.in_channels - model.vae.channels) * shape.latent_frames * _latent_area(model, shape) * element
    found["conditions"] = (
        (2 if shape.guided else 1) * TEXT_TOKENS * dit.text_dim * element
        + branches * text_tokens * dit.dim * element
        + 3 * latents
        + 2 * extra
    )
    found["rope"] = tokens * dit.dim // dit.num_heads * 4
    return found


def _camera_input(model: ModelSizes, shape: JobShape, element: int) -> int:
    return model.dit.camera_channels * shape.latent_frames * shape.height * shape.width * element


def _embed_camera(model: ModelSizes, shape: JobShape, element: int) -> dict[str, int]:
    """Before the first step, on every rank: the whole frames' convolutions, of which a rank keeps its tokens' part."""
    tokens = _num_tokens(model, shape) * model.dit.dim * element
    # The input, its copy by frames and that by squares; what the first convolution makes, and a residual block's three.
    return {"camera": 3 * _camera_input(model, shape, element), "embedding": 4 * tokens}


def _decode(model: ModelSizes, shape: JobShape, world_size: int, rank: int, element: int) -> dict[str, int]:
    vae = model.vae
    area = _latent_area(model, shape)
    latents = vae.channels * shape.latent_frames * area * element
    found = {"latents": 2 * latents}
    if shape.tiled:
        tile = min(_TILE[0], shape.height // vae.factor) * min(_TILE[1], shape.width // vae.factor) * vae.factor**2
        made = 3 * shape.num_frames * tile * element
        found["vae_decode"] = int(vae.decode_planes * tile * element) + made
        if rank == 0:  # which then has a tile of every rank, and one weighted by its mask
            found["vae_decode"] = max(found["vae_decode"], (world_size + 1) * made)
            found["blending"] = 4 * shape.num_frames * shape.height * shape.width * element
        return found
    band = _band_share(shape.height // vae.factor, shape.width // vae.factor, world_size)
    found["vae_decode"] = int(vae.decode_planes * band * shape.height * shape.width * element)
    return found


def _encode_text(model: ModelSizes, element: int) -> dict[str, int]:
    text = model.text
    scores = text.num_heads * TEXT_TOKENS**2
    # Scores, position bias and their sum in the model's dtype, and the softmax in float32, from a copy in float32.
    softmax = 4 if element == 4 else 2 * 4
    return {"text_encoding": scores * (3 * element + softmax) + 4 * TEXT_TOKENS * text.ffn_dim * element}


def _encode_frames(model: ModelSizes, shape: JobShape, world_size: int, rank: int, element: int) -> dict[str, int]:
    vae, pixels = model.vae, shape.height * shape.width
    share = _band_share(shape.height // vae.factor, shape.width // vae.factor, world_size)
    if shape.tiled:
        share = min(1.0, _TILE[0] * _TILE[1] * vae.factor**2 / pixels)
    video = 3 * shape.num_frames * pixels * element
    # VACE's: its mask, and what shall stay and what shall change of it, beside it.
    whole = 4 * video if model.dit.vace_layers else video
    return {
        "vae_encode": int(vae.encode_planes * share * pixels * element),
        "input_video": int(whole if rank == 0 else video * share),
    }


def _num_tokens(model: ModelSizes, shape: JobShape) -> int:
    return shape.latent_frames * _latent_area(model, shape) // 4


def _latent_area(model: ModelSizes, shape: JobShape) -> int:
    return (shape.height // model.vae.factor) * (shape.width // model.vae.factor)


def _band_share(rows: int, columns: int, world_size: int) -> float:
    """The largest band's share of the frame, as `parallel.bands.cut_bands` cuts it."""
    return min(math.ceil(size / min(world_size, size)) / size for size in (rows, columns))
