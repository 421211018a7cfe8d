"""Runs sharded blocks on every rank: torchrun -m tests.distributed.sharding_ranks OUTPUT.json.

Rank 0 tells how many streams the gathering used over two passes, and whether the result is that of whole blocks: of
these, and of a pass after one that failed, with other weights.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from parallel.lora import local_part
from parallel.sharding import let_go, shard_blocks
from parallel.world import join, read_launch

BLOCKS, WIDTH = 12, 256


def main() -> None:
    world = join(read_launch(), device_kind="auto")
    torch.manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, device=world.device) / WIDTH**0.5 for _ in range(BLOCKS)]
    with torch.device("meta"):
        blocks = [torch.nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(BLOCKS)]
    shard_blocks(blocks, world)
    for block, weight in zip(blocks, weights, strict=True):
        local, rows = local_part(block.weight)
        local.copy_(weight[rows])
    seen: list[Any] = []
    for block in blocks:
        block.register_forward_hook(lambda module, _inputs, _output: seen.append(_stream(module)))
    x = torch.randn(8, WIDTH, device=world.device)
    with torch.no_grad():
        for _ in range(2):
            sharded = whole = x
            for block, weight in zip(blocks, weights, strict=True):
                sharded, whole = block(sharded), whole @ weight.T
        told = {"calls": len(seen), "streams": len({id(each) for each in seen}), "equal": torch.equal(sharded, whole)}
        # Leaves the next block on its way, and this one gathered, but on rank 0 alone.
        failing = (
            blocks[5].register_forward_pre_hook(_fail)
            if world.rank == 0
            else blocks[5].register_forward_hook(lambda module, inputs, _output: _fail(module, inputs))
        )
        with contextlib.suppress(_ToldError):
            for block in blocks:
                sharded = block(sharded)
        failing.remove()
        let_go(blocks)
        for block in blocks:
            local_part(block.weight)[0].mul_(0.5)
        sharded, whole = x, x
        for block, weight in zip(blocks, weights, strict=True):
            sharded, whole = block(sharded), whole @ (0.5 * weight).T
        told["equal after a failure"] = torch.equal(sharded, whole)
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(told))
    world.leave()


class _ToldError(Exception):
    pass


def _fail(_module: Any, _inputs: Any) -> None:
    raise _ToldError


def _stream(block: Any) -> Any:
    return block._get_fsdp_state()._comm_ctx.all_gather_copy_in_stream


if __name__ == "__main__":
    main()
