"""Where the denoising loop waits for its device: torchrun -m tests.gpu.waits_ranks OUTPUT (to OUTPUT.RANK).

Every split of the ranks, compiled as the daemon runs it, whole weights and sharded ones, at a tiny shape. Tells for
each the places that waited, by torch's own watch over calls that do (`torch.cuda.set_sync_debug_mode`).
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from parallel.bench_variants import Case, our_variants, random_dit
from parallel.world import World, join, read_launch

STEPS = 12  # the check for divergence looks at the first, the eleventh and the last one


def main() -> None:
    world = join(read_launch(), device_kind="cuda")
    with _watch() as told_places:
        torch.cuda.set_sync_debug_mode("warn")
        torch.ones(1, device=world.device).item()
    told = {"a call that does": told_places}
    for sharded in (False, True) if world.world_size > 1 else (False,):
        told |= _variants(world, sharded=sharded)
    Path(f"{sys.argv[1]}.{world.rank}").write_text(json.dumps(told))
    world.leave()


def _variants(world: World, *, sharded: bool) -> dict[str, list[str]]:
    dit = random_dit("tiny-t2v", world, torch.bfloat16, sharded=sharded)
    case = Case(height=128, width=192, num_frames=33)
    label = "fsdp" if sharded else "resident"
    told = {}
    for variant in our_variants(dit, label, case, world, compiled=True, sharded=sharded):
        if variant.ranks > 1 or world.rank == 0:
            variant.run(STEPS)  # compiles
            with _watch() as places, _from_the_third_call(dit):
                variant.run(STEPS)
            told[variant.name] = places
        world.all_true(True)
    return told


@contextlib.contextmanager
def _from_the_third_call(dit: Any) -> Iterator[None]:
    """Watches from the second or third step on; before the first one the conditions come from the host."""
    calls = 0

    def count(_module: Any, _arguments: Any, _named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            torch.cuda.set_sync_debug_mode("warn")

    hook = dit.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
    assert calls > 3, "the transformer was not called as it was thought to be"


@contextlib.contextmanager
def _watch() -> Iterator[list[str]]:
    """The places of what waited within, when it ends."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places += [f"{each.filename}:{each.lineno}" for each in seen if "synchronizing CUDA" in str(each.message)]


if __name__ == "__main__":
    main()
