"""Tensors that share page-locked memory."""

import math
from typing import Any

import torch

from parallel.host_memory import page_locked, plan_slabs
from parallel.parts import layout_of
from parallel.profile import load_profile


def test_an_encoder_takes_hardly_more_than_its_size() -> None:
    """UMT5-XXL's published layout: torch rounds each slab up to a power of two, and that costs less than 5 %."""
    part = next(part for part in load_profile("wan2.1-t2v-14b").parts if part.role == "text_encoder")
    sizes = {name: 2 * math.prod(shape) for name, shape in layout_of(part).items()}
    slabs = plan_slabs(sizes)
    assert sorted(name for names in slabs for name in names) == sorted(sizes)
    taken = sum(1 << (sum(sizes[name] for name in names) - 1).bit_length() for names in slabs)
    alone = sum(1 << (size - 1).bit_length() for size in sizes.values())
    assert taken < 1.05 * sum(sizes.values()) < alone


def test_each_tensor_has_its_own_place() -> None:
    """What is written to one is in no other, whether it shares a slab, fills one, or has none that is large enough."""
    shapes = {"a": (3, 5), "b": (2, 2, 2), "scalar": (), "c": (7,), "none": (0, 4), "large": (40,)}
    made: list[int] = []

    def empty(number: int, *, dtype: torch.dtype, pin_memory: bool) -> Any:
        assert pin_memory
        made.append(number)
        return torch.empty(number, dtype=dtype)  # there is no GPU to lock pages for

    tensors = page_locked(shapes, torch.float32, empty=empty, slab=64)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    for number, tensor in enumerate(tensors.values()):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors.values()):
        assert tensor.is_contiguous()
        assert (tensor == number).all()
    assert made == [40, 16, 15]
