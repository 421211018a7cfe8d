"""Nested values as a small JSON description and a list of tensors, and back.

Owns the form in which rank 0 tells the peers what tensors will come and where they belong: no pickle. Leaves out how
both travel (`parallel.world`).
"""

from collections.abc import Mapping
from typing import Any

import torch


class Packing:
    """Describes nested values as JSON and collects their tensors, each once however often it is named."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}

    def describe(self, value: Any) -> dict[str, Any]:
        """Describes a tensor, a plain value, or lists, tuples and dictionaries of them. Raises TypeError otherwise."""
        match value:
            case torch.Tensor():
                if id(value) not in self._places:
                    self._places[id(value)] = len(self.tensors)
                    self.tensors.append(value)
                return {"tensor": self._places[id(value)]}
            case dict():
                return {"dict": {name: self.describe(item) for name, item in value.items()}}
            case list():
                return {"list": [self.describe(item) for item in value]}
            case tuple():
                return {"tuple": [self.describe(item) for item in value]}
            case None | bool() | int() | float() | str():
                return {"plain": value}
            case _:
                raise TypeError(f"a {type(value).__name__} cannot be given to the other ranks")


def rebuild(described: Mapping[str, Any], tensors: list[torch.Tensor]) -> Any:
    """The value that `Packing.describe` described, with `tensors` in its places. Raises ValueError for other JSON."""
    match described:
        case {"tensor": int(index)}:
            return tensors[index]
        case {"dict": dict(items)}:
            return {name: rebuild(item, tensors) for name, item in items.items()}
        case {"list": list(items)}:
            return [rebuild(item, tensors) for item in items]
        case {"tuple": list(items)}:
            return tuple(rebuild(item, tensors) for item in items)
        case {"plain": value}:
            return value
        case _:
            raise ValueError(f"a description of another form: {described!r:.200}")


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, dtype and whether it is on the host, as JSON."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "on_host": tensor.device.type == "cpu"}
