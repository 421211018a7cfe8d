"""What the divergence check says on each rank: torchrun -m tests.distributed.checks_ranks OUTPUT (to OUTPUT.RANK)."""

import json
import sys
from pathlib import Path

import torch

from parallel.checks import DivergenceCheck
from parallel.outcome import DivergedError
from parallel.world import join, read_launch


def main() -> None:
    world = join(read_launch(), device_kind="cpu")
    told = {}
    for name, odd in (("equal", None), ("one bit", 0), ("exchanged", 1)):
        latents = torch.arange(24, dtype=torch.bfloat16).view(1, 2, 3, 2, 2)
        if world.rank == 1 and odd == 0:
            latents.view(torch.int16)[0, 1, 2, 1, 1] ^= 1
        if world.rank == 1 and odd == 1:
            latents = latents.flip(-1)
        check = DivergenceCheck(world, interval=10)
        told[name] = ""
        try:
            check.look(latents, step=0, last=False)
            check.settle()
        except DivergedError as error:
            told[name] = str(error)
    Path(f"{sys.argv[1]}.{world.rank}").write_text(json.dumps(told))
    world.leave()


if __name__ == "__main__":
    main()
