"""Runs sharded blocks on every rank: torchrun -m tests.distributed.sharding_ranks OUTPUT.json.

Rank 0 tells how many streams the gathering used over two passes, and whether the result is that of whole blocks: of
these, and of two passes after one that failed, with other weights.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel import collectives
from parallel.lora import local_part
from parallel.sharding import common_root, let_go, shard_blocks
from parallel.world import join, read_launch

BLOCKS, WIDTH = 12, 240


class Block(torch.nn.Module):
    """Two products and, as in attention, an exchange between them in a group that is not FSDP's."""

    def __init__(self, group: Any, size: int) -> None:
        super().__init__()
        self.group, self.size = group, size
        self.first = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sent = self.first(x)
        received = torch.empty_like(sent)
        collectives.all_to_all_single(received, sent, group=self.group)
        if self.fails:
            raise _ToldError
        return self.second(received)  # type: ignore[no-any-return]  # Module's call


def main() -> None:
    world = join(read_launch(), device_kind="auto")
    device, size = world.device, world.world_size
    torch.manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5 for _ in range(2 * BLOCKS)]
    group: Any = dist.new_group(list(range(size)))
    with torch.device("meta"):
        blocks = [Block(group, size).requires_grad_(False) for _ in range(BLOCKS)]
    shard_blocks(blocks[:5], world)
    shard_blocks(blocks[5:], world)  # as of another DiT
    root = common_root(blocks, world)
    layers = [layer for block in blocks for layer in (block.first, block.second)]
    for layer, weight in zip(layers, weights, strict=True):
        local, rows = local_part(layer.weight)
        local.copy_(weight[rows])
    seen: list[Any] = []
    for block in blocks:
        block.register_forward_hook(lambda module, _inputs, _output: seen.append(_stream(module)))
    x = torch.randn(2 * size, WIDTH, device=device)

    def run(scale: float) -> bool:
        """Whether a pass gives what whole blocks give, whose weights are `scale` times the first ones."""
        sharded = whole = x
        for number, block in enumerate(blocks):
            sharded = block(sharded)
            first, second = (scale * weight for weight in weights[2 * number : 2 * number + 2])
            sent, received = whole @ first.T, torch.empty_like(whole)
            dist.all_to_all_single(received, sent, group=group)
            whole = received @ second.T
        return torch.equal(sharded, whole)

    with torch.no_grad():
        told: dict[str, Any] = {"equal": run(1) and run(1)}
        told |= {"calls": len(seen), "streams": len({id(each) for each in seen}), "records": _records(blocks)}
        let_go(root)
        told["records let go"] = _records(blocks)
        # After the same transfers on all, but within a block on rank 0 and after it on the others.
        after = None
        if world.rank == 0:
            blocks[6].fails = True
        else:
            after = blocks[6].register_forward_hook(_fail)
        with contextlib.suppress(_ToldError):
            run(1)
        blocks[6].fails = False
        if after is not None:
            after.remove()
        told["at one place"] = len(set(world.gather_numbers(collectives.place()))) == 1
        let_go(root)
        for layer in layers:
            local_part(layer.weight)[0].mul_(0.5)
        told["equal after a failure"] = run(0.5) and run(0.5)
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(told))
    world.leave()


class _ToldError(Exception):
    pass


def _fail(_module: Any, _inputs: Any, _output: Any) -> None:
    raise _ToldError


def _records(blocks: list[Block]) -> int:
    """How many calls FSDP keeps for a backward pass."""
    return len(blocks[0]._get_fsdp_state()._comm_ctx.post_forward_order)  # type: ignore[operator]


def _stream(block: Any) -> Any:
    return block._get_fsdp_state()._comm_ctx.all_gather_copy_in_stream


if __name__ == "__main__":
    main()
