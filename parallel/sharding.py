"""Weights that are spread over the ranks (FSDP2): each rank keeps 1/N of every block of a DiT.

A block's weights are gathered when the block is called and let go after it; the next block's are gathered meanwhile.
What a DiT has outside its blocks (embeddings, head: 2 % of 14B) stays whole on every rank, because it is used outside
of `DiT.forward`. Leaves out the encoder, which works on rank 0 alone.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from parallel import collectives
from parallel.world import World


class _Gathering:
    """How a block is gathered, in FSDP's terms: as by default, and counted."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> Any:
        return collectives.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class _Blocks(torch.nn.Module):
    """What FSDP takes for the root of all blocks; nobody calls it to compute anything."""

    def __init__(self, blocks: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, _nothing: None) -> None:
        pass


def shard_blocks(blocks: Sequence[torch.nn.Module], world: World) -> None:
    """Called by every rank, while a DiT's blocks are still on the meta device and in their final dtype.

    Afterwards their parameters are shards, with memory on the rank's device that nobody has written to yet, and stay
    where they are. Before the first pass all blocks need a `common_root`.
    """
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    sharded: list[FSDPModule] = []
    for block in blocks:
        wrapped: FSDPModule = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        gathering: Any = _Gathering()  # FSDP has no public name for its type
        wrapped.set_custom_all_gather(gathering)
        block.to_empty(device=world.device)
        sharded.append(wrapped)
    for wrapped, following in itertools.pairwise(sharded):
        wrapped.set_modules_to_forward_prefetch([following])


def common_root(blocks: Iterable[torch.nn.Module], world: World) -> FSDPModule:
    """Called by every rank, once for all sharded blocks of a model. Returns what `let_go` takes.

    A root's first call makes the streams of all below it. Without one in common each block would be a root and make its
    own, and what is gathered in a stream is memory that the allocator never gives to another: the whole DiT.
    """
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    root = _Blocks(blocks)
    sharded: FSDPModule = fully_shard(root, mesh=mesh)
    root(None)  # an older torch takes no call without an argument on a GPU
    return sharded


def let_go(root: FSDPModule) -> None:
    """After a job's last pass, or after an error in mid-pass: no block is gathered or on its way, none holds a record.

    An error leaves a block gathered and the next one on its way; the next pass would run them with these weights,
    though others have come since, and would gather other blocks ahead than on a rank whose error came a moment later.
    And each pass is recorded for a backward pass that never comes. Talks to no other rank. (Needs torch 2.13.)
    """
    root.reset_iter_state()
