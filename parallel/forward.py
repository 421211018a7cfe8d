"""One forward of the diffusion transformer over this rank's slice of the tokens.

The equal of DiffSynth's `model_fn_wan_video` (2.1.12) for every plain `WanModel`: text, image and reference inputs,
camera control, VACE hints, motion control, and the separated timesteps of TI2V-5B. Written anew because DiffSynth's
embeds every token on every rank, builds the RoPE table at each call, rotates in float64, and cannot be compiled block
by block around the exchange. Weights are reached through the modules that own them and blocks through their
`__call__`, so that FSDP2 and DiffSynth's VRAM management see every use.

Leaves out the exchange (`parallel.attention`), guidance and the steps (`parallel.denoise`).
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffsynth.models.wan_video_dit import DiTBlock, WanModel, sinusoidal_embedding_1d
from torch import Tensor

from parallel.attention import Sequence
from parallel.groups import SplitGroups
from parallel.rope import RopeTable, RopeTables, TokenGrid, rotate
from parallel.split import DitShape


@dataclass(frozen=True, slots=True)
class Modulation:
    """The timestep's part of the adaptive layer norms.

    embedded: (1, n, dim); projected: (1, n, 6, dim). n is 1, or 2 where the first frame's tokens have a timestep of
    their own (row 0); then `later`, (1, slice_tokens, 1), says which of this rank's tokens take row 1.
    """

    embedded: Tensor
    projected: Tensor
    later: Tensor | None


@dataclass(slots=True)
class BranchMemory:
    """What one branch of guidance keeps from step to step of one job, by transformer: nothing of it changes."""

    context: dict[int, Tensor] = field(default_factory=dict)
    camera: dict[int, Tensor] = field(default_factory=dict)  # what its path adds to this rank's slice
    residual: Tensor | None = None  # of the step cache, for this rank's slice

    def forget(self) -> None:
        self.context.clear()
        self.camera.clear()
        self.residual = None


def load_compiler() -> None:
    """Imports what `torch.compile` wants, seconds of it, where blocks are compiled by default: on GPUs.

    For the process that ranks are forked from. It asks whether there is a GPU without using it.
    """
    if torch.cuda.is_available():
        importlib.import_module("torch._inductor.compile_fx")


def prepare_dit(dit: WanModel, *, compile_blocks: bool) -> None:
    """Has `dit(...)` and its blocks run this module's forward. Raises ValueError for a transformer it cannot run."""
    extras = [name for name in _REFUSED if getattr(dit, name, False)]
    if extras:
        raise ValueError(f"{type(dit).__name__} with {', '.join(extras)} has no parallel forward")
    bind_forward(dit, forward_slice, compile_blocks=compile_blocks)


def bind_forward(dit: Any, forward: Callable[..., Tensor], *, compile_blocks: bool) -> None:
    """Has `dit(...)` run `forward(dit, ...)`, and its blocks the halves of a `BlockRunner`."""
    runner = BlockRunner(compile_blocks=compile_blocks)
    dit.forward = functools.partial(forward, dit)
    for block in dit.blocks:
        block.forward = functools.partial(runner.run, block)


_REFUSED = ("wantodance_enable_music_inject", "wantodance_enable_global", "wantodance_enable_dynamicfps")


_SHAPES_COMPILED = 64  # past as many, torch runs further shapes eagerly


def _as_it_is(function: Any) -> Any:
    return function


class BlockRunner:
    """Runs a block in two halves around the exchange; each half is one compiled graph, shared by all blocks."""

    def __init__(self, *, compile_blocks: bool) -> None:
        # Parameters are inputs of the graph (inlined modules), so the blocks share two compilations a shape. Each
        # shape has its own: kernels for any shape are slower, and a compiled shape comes from the disk the next time.
        wrap: Callable[[Any], Any] = functools.partial(torch.compile, dynamic=False) if compile_blocks else _as_it_is
        if compile_blocks:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES_COMPILED)
        self._queries_keys_values: Callable[..., tuple[Tensor, Tensor, Tensor]] = wrap(queries_keys_values)
        self._packed: Callable[..., Tensor] = wrap(before_exchange)
        self._after: Callable[..., Tensor] = wrap(after_attention)

    def run(
        self, block: DiTBlock, x: Tensor, context: Tensor, modulation: Modulation, rope: RopeTable, sequence: Sequence
    ) -> Tensor:
        """x: (1, slice_tokens, dim), context: (1, text tokens, dim). Returns x's shape."""
        projected, later = modulation.projected, modulation.later
        if sequence.groups.sequence.size == 1:
            attended = sequence.attend_alone(*self._queries_keys_values(block, x, projected, later, rope.cos, rope.sin))
        else:
            ulysses = sequence.groups.ulysses.size
            attended = sequence.attend(self._packed(block, x, projected, later, rope.cos, rope.sin, ulysses))
        result: Tensor = self._after(block, x, attended, context, projected, later)
        return result


def before_exchange(
    block: DiTBlock, x: Tensor, projected: Tensor, later: Tensor | None, cos: Tensor, sin: Tensor, ulysses: int
) -> Tensor:
    """Norm, q, k, v and RoPE: x (1, slice, dim) to what `Sequence.attend` takes."""
    packed = torch.stack(queries_keys_values(block, x, projected, later, cos, sin), dim=2)
    # (slice, 1, 3, heads, head_dim): the heads' groups go first, because an all-to-all splits the first dimension.
    grouped: Tensor = packed.unflatten(3, (ulysses, -1)).permute(3, 0, 1, 2, 4, 5).contiguous()
    return grouped


def queries_keys_values(
    block: DiTBlock, x: Tensor, projected: Tensor, later: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, q, k, v and RoPE: x (1, slice, dim) to three times (slice, 1, heads, head_dim)."""
    attention = block.self_attn
    shift, scale, _, _, _, _ = _modulation(block.modulation, projected, later)
    normed = block.norm1(x) * (1 + scale) + shift
    heads = attention.num_heads
    q = attention.norm_q(attention.q(normed)).unflatten(-1, (heads, -1)).transpose(0, 1)
    k = attention.norm_k(attention.k(normed)).unflatten(-1, (heads, -1)).transpose(0, 1)
    v = attention.v(normed).unflatten(-1, (heads, -1)).transpose(0, 1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(
    block: DiTBlock, x: Tensor, attended: Tensor, context: Tensor, projected: Tensor, later: Tensor | None
) -> Tensor:
    """Output projection, cross-attention and feed-forward; attended as `Sequence.attend` returns it."""
    _, _, gate_attention, shift, scale, gate_mlp = _modulation(block.modulation, projected, later)
    own = attended.permute(2, 1, 0, 3, 4).flatten(2)
    x = x + gate_attention * block.self_attn.o(own)
    x = x + _cross_attention(block.cross_attn, block.norm3(x), context)
    normed = block.norm2(x) * (1 + scale) + shift
    result: Tensor = x + gate_mlp * _feed_forward(block.ffn, normed)
    return result


def _feed_forward(ffn: Any, x: Tensor) -> Tensor:
    """Linear, GELU (tanh), linear; on a GPU the GELU is done where the first product is written (cuBLASLt)."""
    up, activation, down = ffn
    if x.is_cuda and type(up) is torch.nn.Linear and getattr(activation, "approximate", None) == "tanh":
        product = torch._addmm_activation(up.bias, x.flatten(0, -2), up.weight.t(), use_gelu=True)
        result: Tensor = down(product.unflatten(0, x.shape[:-1]))
    else:
        result = ffn(x)
    return result


def _cross_attention(attention: Any, x: Tensor, context: Tensor) -> Tensor:
    """`CrossAttention.forward`, with SDPA as the kernel: the text is so short that the choice does not matter."""
    heads = attention.num_heads

    def split(tensor: Tensor) -> Tensor:
        result: Tensor = tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
        return result

    text = context[:, _IMAGE_TOKENS:] if attention.has_image_input else context
    q = split(attention.norm_q(attention.q(x)))
    k, v = split(attention.norm_k(attention.k(text))), split(attention.v(text))
    out = F.scaled_dot_product_attention(q, k, v)
    if attention.has_image_input:
        image = context[:, :_IMAGE_TOKENS]
        k, v = split(attention.norm_k_img(attention.k_img(image))), split(attention.v_img(image))
        out = out + F.scaled_dot_product_attention(q, k, v)
    result: Tensor = attention.o(out.transpose(1, 2).flatten(2))
    return result


_IMAGE_TOKENS = 257  # CLIP's class token and its 16 x 16 patches, in front of the text


def _modulation(own: Tensor, projected: Tensor, later: Tensor | None) -> list[Tensor]:
    """A block's (1, k, dim) modulation plus the timestep's: k tensors, (1, 1, dim) or (1, slice, dim)."""
    rows = own.to(projected.dtype).unsqueeze(1) + projected
    if later is None:
        return list(rows.unbind(2))
    return [torch.where(later, each[:, 1:2], each[:, 0:1]) for each in rows.unbind(2)]


def forward_slice(
    dit: WanModel,
    *,
    latents: Tensor,
    timestep: Tensor,
    inputs: dict[str, Any],
    groups: SplitGroups,
    tables: RopeTables,
    memory: BranchMemory,
    vace: Any = None,
    motion_controller: Any = None,
    reuse_residual: bool = False,
    keep_residual: bool = False,
) -> Tensor:
    """Predicts the noise. Called by every rank of the sequence group.

    latents: (1, channels, frames, height, width); timestep: (1,), in latents' dtype; inputs: the branch's conditions
    by `model_fn_wan_video`'s names. Returns the prediction in latents' shape, whole on every rank, in latents' dtype.
    With `reuse_residual` the blocks are left out and what they added at the last full step is added again.
    """
    context = embed_context(dit, inputs, memory)
    x, grid, leading = _embed(dit, latents, inputs, groups, memory)
    sequence = Sequence(groups, grid.num_tokens)
    if x.shape[1] == sequence.num_tokens:  # not yet cut into slices
        x = sequence.own(x)
    modulation = _timestep(dit, latents, timestep, inputs, sequence, motion_controller)
    rope = tables.table(dit, grid, begin=sequence.begin, length=sequence.own_tokens, padded=sequence.slice_tokens)
    if reuse_residual:
        assert memory.residual is not None, "the first step is always computed"
        x = x + memory.residual
    else:
        embedded = x if keep_residual else None  # the blocks may have its memory
        hints = _vace_hints(vace, x, context, modulation, rope, sequence, inputs)
        for index, block in enumerate(dit.blocks):
            x = block(x, context, modulation, rope, sequence)
            if index in hints:
                x = x + hints[index] * inputs.get("vace_scale", 1.0)
        if embedded is not None:
            memory.residual = x - embedded
    shift, scale = _modulation(dit.head.modulation, modulation.embedded.unsqueeze(2), modulation.later)
    predicted = dit.head.head(dit.head.norm(x) * (1 + scale) + shift)
    whole = sequence.whole(predicted)[:, leading:]
    frames = grid.frames - leading // (grid.height * grid.width)
    unpatched: Tensor = dit.unpatchify(whole, (frames, grid.height, grid.width))
    return unpatched


def embed_context(dit: Any, inputs: dict[str, Any], memory: BranchMemory) -> Tensor:
    """The embedded prompt, after the image's tokens where the model takes them; computed once a job."""
    if id(dit) not in memory.context:
        context = dit.text_embedding(inputs["context"])
        clip_feature = inputs.get("clip_feature")
        if clip_feature is not None and dit.require_clip_embedding:
            context = torch.cat((dit.img_emb(clip_feature), context), dim=1)
        memory.context[id(dit)] = context
    return memory.context[id(dit)]


def _embed(
    dit: WanModel, latents: Tensor, inputs: dict[str, Any], groups: SplitGroups, memory: BranchMemory
) -> tuple[Tensor, TokenGrid, int]:
    """Latents to tokens: this rank's slice where that can be cut out first, else all of them.

    Returns the tokens, (1, slice or all, dim), the grid, and how many tokens stand before the video's own.
    """
    x = latents
    y = inputs.get("y")
    camera = inputs.get("control_camera_latents_input") if dit.control_adapter is not None else None
    if y is not None and dit.require_vae_embedding:
        x = torch.cat((x, y), dim=1)
    _, step_height, step_width = dit.patch_size
    grid = TokenGrid(x.shape[2], x.shape[3] // step_height, x.shape[4] // step_width)
    reference = inputs.get("reference_latents")
    embedding = dit.patch_embedding
    if reference is None and type(embedding) is torch.nn.Conv3d:
        # A convolution whose kernel is its stride is a matrix product over patches, so each rank embeds its own.
        patches = x.unflatten(4, (grid.width, step_width)).unflatten(3, (grid.height, step_height))
        # (1, c, f, h, y, w, x) -> (1, f h w, c y x)
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(1, grid.num_tokens, -1)
        sequence = Sequence(groups, grid.num_tokens)
        tokens = F.linear(sequence.own(patches), embedding.weight.flatten(1), embedding.bias)
        return tokens if camera is None else tokens + _camera(dit, camera, sequence, memory), grid, 0
    tokens = dit.patchify(x, camera).flatten(2).transpose(1, 2)
    if reference is None:
        return tokens, grid, 0
    if reference.ndim == 5:
        reference = reference[:, :, 0]
    leading = dit.ref_conv(reference).flatten(2).transpose(1, 2)
    grid = TokenGrid(grid.frames + 1, grid.height, grid.width)
    return torch.cat((leading, tokens), dim=1), grid, leading.shape[1]


def _camera(dit: WanModel, camera: Tensor, sequence: Sequence, memory: BranchMemory) -> Tensor:
    """What the camera's path adds to this rank's tokens: of convolutions over all of it, but the same at each step."""
    if id(dit) not in memory.camera:
        (added,) = dit.control_adapter(camera)
        memory.camera[id(dit)] = sequence.own(added.flatten(1).T.unsqueeze(0)).contiguous()
    return memory.camera[id(dit)]


def _timestep(
    dit: WanModel,
    latents: Tensor,
    timestep: Tensor,
    inputs: dict[str, Any],
    sequence: Sequence,
    motion_controller: Any,
) -> Modulation:
    later = None
    if dit.seperated_timestep and inputs.get("fuse_vae_embedding_in_latents"):
        # The first frame is given, so its tokens are at timestep 0. Two rows stand for one a token.
        timestep = torch.cat((torch.zeros_like(timestep), timestep))
        first_frame = latents.shape[3] * latents.shape[4] // 4
        number = torch.arange(sequence.begin, sequence.begin + sequence.slice_tokens, device=latents.device)
        later = (number >= first_frame).view(1, -1, 1)
    embedded = dit.time_embedding(sinusoidal_embedding_1d(dit.freq_dim, timestep))
    projected = dit.time_projection(embedded).unflatten(1, (6, dit.dim))
    motion_bucket_id = inputs.get("motion_bucket_id")
    if motion_bucket_id is not None and motion_controller is not None:
        projected = projected + motion_controller(motion_bucket_id).unflatten(1, (6, dit.dim))
    return Modulation(embedded=embedded.unsqueeze(0), projected=projected.unsqueeze(0), later=later)


def _vace_hints(
    vace: Any,
    x: Tensor,
    context: Tensor,
    modulation: Modulation,
    rope: RopeTable,
    sequence: Sequence,
    inputs: dict[str, Any],
) -> dict[int, Tensor]:
    """VACE's hints for this rank's tokens, by the number of the block that they follow."""
    if inputs.get("vace_context") is None:
        return {}
    hints = vace(x, inputs["vace_context"], context, modulation, rope, sequence)
    return {block: hints[place] for block, place in vace.vace_layers_mapping.items()}


def shape_of(dit: WanModel) -> DitShape:
    """The sizes that decide what a split costs."""
    block = dit.blocks[0]
    return DitShape(dim=dit.dim, ffn_dim=block.ffn_dim, num_heads=block.num_heads, num_layers=len(dit.blocks))
