"""Self-attention over a sequence that is spread over the ranks (DeepSpeed-Ulysses).

Every rank holds a slice of the tokens. One fused all-to-all trades token slices for head slices of q, k and
v, each rank attends over the whole sequence with its heads, and a second all-to-all trades back.
Source: https://arxiv.org/abs/2309.14509. Leaves out the slicing itself, which DiffSynth's
`model_fn_wan_video` does when `use_unified_sequence_parallel` is set; it pads the last slice, and the padding
is not attended here.
"""

import types

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffsynth.models.wan_video_dit import SelfAttention, WanModel, rope_apply


def enable_ulysses(dit: WanModel) -> None:
    """Makes every self-attention of the DiT run over xfuser's Ulysses group. Called by every rank."""
    for block in dit.blocks:
        block.self_attn.forward = types.MethodType(_ulysses_forward, block.self_attn)


def _ulysses_forward(self: SelfAttention, x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """`SelfAttention.forward` for a slice. Called by every rank.

    x: (batch, slice, dim), this rank's tokens; freqs: (tokens, 1, head_dim / 2) complex, of the whole
    sequence.
    Returns (batch, slice, dim).
    """
    from xfuser.core.distributed import get_sp_group

    # The ring degree is 1, so the sequence-parallel group is the Ulysses group; xfuser makes the latter only
    # where yunchang finds a GPU.
    group = get_sp_group().device_group
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, slice_length, dim = x.shape
    num_tokens = freqs.shape[0]
    heads, head_dim = self.num_heads // world_size, dim // self.num_heads

    begin = rank * slice_length
    own_freqs = freqs[begin : begin + slice_length]
    if own_freqs.shape[0] < slice_length:  # the padding's rotation does not matter, only its shape
        own_freqs = torch.cat([own_freqs, freqs[:1].expand(slice_length - own_freqs.shape[0], -1, -1)])
    q = rope_apply(self.norm_q(self.q(x)), own_freqs, self.num_heads)
    k = rope_apply(self.norm_k(self.k(x)), own_freqs, self.num_heads)
    v = self.v(x)

    # (3, b, slice, ranks, heads, d) -> ranks first, because all_to_all_single splits the first dimension.
    qkv = torch.stack((q, k, v)).view(3, batch, slice_length, world_size, heads, head_dim)
    send = qkv.permute(3, 0, 1, 2, 4, 5).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    # (ranks, 3, b, slice, heads, d) -> (3, b, heads, ranks * slice, d), without the padding at the end.
    whole = received.permute(1, 2, 4, 0, 3, 5).reshape(3, batch, heads, world_size * slice_length, head_dim)
    q, k, v = whole[:, :, :, :num_tokens].unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v)
    padding = world_size * slice_length - num_tokens
    if padding:
        attended = F.pad(attended, (0, 0, 0, padding))

    back = attended.view(batch, heads, world_size, slice_length, head_dim).permute(2, 0, 3, 1, 4).contiguous()
    own = torch.empty_like(back)
    dist.all_to_all_single(own, back, group=group)
    # (ranks, b, slice, heads, d): rank r sent the heads [r * heads, (r + 1) * heads).
    output: torch.Tensor = self.o(own.permute(1, 2, 0, 3, 4).reshape(batch, slice_length, dim))
    return output
