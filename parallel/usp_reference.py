"""DiffSynth's own multi-GPU path, repaired just enough to run: the benchmark's other side.

Its attention is hard-wired to FlashAttention 2 and to the Ulysses group that xfuser makes on GPUs only. Here the same
steps are taken (three all-to-alls for q, k and v, one back, RoPE in float64 over a table padded at each call,
`empty_cache` in every block) with SDPA as the kernel and over the default group. Used by `parallel.bench` alone.
"""

import types
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffsynth.models.wan_video_dit import rope_apply
from diffsynth.pipelines.wan_video import model_fn_wan_video
from torch import Tensor
from yunchang.comm.all_to_all import all_to_all_4D

from parallel.world import World


def enable_usp(dit: Any, world: World) -> None:
    """Makes `usp_model_fn` possible for the transformer; plain DiffSynth must have been run before."""
    import xfuser.core.distributed as xfuser_groups

    group = dist.group.WORLD
    coordinator = types.SimpleNamespace(
        world_size=world.world_size,
        rank_in_group=world.rank,
        all_gather=lambda tensor, dim: torch.cat(_gather(tensor, world), dim=dim),
    )
    # What DiffSynth's model function imports at each call.
    xfuser_groups.get_sp_group = lambda: coordinator
    xfuser_groups.get_sequence_parallel_world_size = lambda: world.world_size
    xfuser_groups.get_sequence_parallel_rank = lambda: world.rank
    for block in dit.blocks:
        block.self_attn.forward = types.MethodType(_attention(world, group), block.self_attn)


def usp_model_fn(**arguments: Any) -> Tensor:
    """DiffSynth's model function with its sequence parallelism on. Called by every rank."""
    predicted: Tensor = model_fn_wan_video(use_unified_sequence_parallel=True, **arguments)
    return predicted


def _attention(world: World, group: Any) -> Any:
    def forward(self: Any, x: Tensor, freqs: Tensor) -> Tensor:
        length = x.shape[1]
        padded = torch.cat((freqs, torch.ones_like(freqs[:1]).expand(length * world.world_size - len(freqs), -1, -1)))
        own = padded[world.rank * length : (world.rank + 1) * length]
        q = rope_apply(self.norm_q(self.q(x)), own, self.num_heads)
        k = rope_apply(self.norm_k(self.k(x)), own, self.num_heads)
        v = self.v(x)
        q, k, v = (
            all_to_all_4D(each.unflatten(2, (self.num_heads, -1)), 2, 1, group=group).transpose(1, 2)
            for each in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out = all_to_all_4D(out.contiguous(), 1, 2, group=group).flatten(2)
        if x.is_cuda:
            torch.cuda.empty_cache()
        result: Tensor = self.o(out)
        return result

    return forward


def _gather(tensor: Tensor, world: World) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(world.world_size)]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered
