"""Page-locked host memory, from which a GPU copies while it works, for many tensors at once.

torch gives page-locked memory in powers of two: UMT5-XXL's tensors, 10.6 GiB, would take 14.0 one by one. So they share
slabs, whose size is one. Leaves out which tensors wait on the host (`parallel.model`).
"""

from collections.abc import Callable, Mapping
from math import prod

import torch

_SLAB_BYTES = 512 << 20


def plan_slabs(sizes: Mapping[str, int], slab: int = _SLAB_BYTES) -> list[list[str]]:
    """Which tensors of these many bytes lie together: the largest first, each in the first slab that has room.

    One larger than a slab has one of its own.
    """
    slabs: list[list[str]] = []
    room: list[int] = []
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        place = next((number for number, free in enumerate(room) if size <= free), None)
        if place is None:
            slabs.append([])
            room.append(max(slab, size))
            place = len(slabs) - 1
        slabs[place].append(name)
        room[place] -= size
    return slabs


def page_locked(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    empty: Callable[..., torch.Tensor] = torch.empty,
    slab: int = _SLAB_BYTES,
) -> dict[str, torch.Tensor]:
    """A tensor of each shape, not written to. `empty` is called as torch's, with `pin_memory`."""
    numbers = {name: prod(shape) for name, shape in shapes.items()}
    tensors: dict[str, torch.Tensor] = {}
    for names in plan_slabs({name: number * dtype.itemsize for name, number in numbers.items()}, slab):
        memory = empty(sum(numbers[name] for name in names), dtype=dtype, pin_memory=True)
        for name, part in zip(names, memory.split([numbers[name] for name in names]), strict=True):
            tensors[name] = part.view(shapes[name])
    return tensors
