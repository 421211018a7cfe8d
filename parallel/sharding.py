"""Weights that are spread over the ranks (FSDP2): each rank keeps 1/N of every block of a DiT.

A block's weights are gathered when the block is called and let go after it; the next block's are gathered meanwhile.
What a DiT has outside its blocks (embeddings, head: 2 % of 14B) stays whole on every rank, because it is used outside
of `DiT.forward`. Leaves out the encoder, which works on rank 0 alone.
"""

import itertools
from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx

from parallel.world import World


def shard_blocks(blocks: Sequence[torch.nn.Module], world: World) -> None:
    """Called by every rank, while the blocks are still on the meta device and in their final dtype.

    Afterwards their parameters are shards, with memory on the rank's device that nobody has written to yet.
    """
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    sharded: list[FSDPModule] = []
    for block in blocks:
        # Explicitly true: every block is a root of its own, and roots keep their weights by default.
        wrapped: FSDPModule = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        block.to_empty(device=world.device)
        sharded.append(wrapped)
    share_comm_ctx(sharded)  # one pair of streams and one gathered buffer for all, or each block would keep its own
    for wrapped, following in itertools.pairwise(sharded):
        wrapped.set_modules_to_forward_prefetch([following])


def warm_up_sharding(blocks: Sequence[torch.nn.Module]) -> None:
    """Called by every rank, once the shards have their weights: FSDP registers the memory they are in now."""
    for block in blocks:
        assert isinstance(block, FSDPModule)
        block.unshard()
        block.reshard()
