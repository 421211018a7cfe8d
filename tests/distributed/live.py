"""Counts the bytes of all tensor storages that are alive, operation by operation: a CPU's `max_memory_allocated`."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Within the block, `peak` is the most bytes that were alive since it was last set to 0."""

    def __init__(self, alive: Iterable[torch.Tensor], *, resized: bool) -> None:
        """`alive`: tensors that exist already and count, such as weights.

        `resized`: whether storages change their size while they live, as FSDP's do; then all are asked each time.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._resized = resized
        self._total = 0
        self.peak = 0
        for tensor in alive:
            self._see(tensor)

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta" or key in self._storages:
            return
        self._storages[key] = (weakref.ref(storage, lambda _: self._forget(key)), storage.nbytes())
        self._total += storage.nbytes()

    def _forget(self, key: int) -> None:
        self._total -= self._storages.pop(key)[1]

    def _alive(self) -> int:
        if not self._resized:
            return self._total
        found = [reference() for reference, _ in list(self._storages.values())]
        return sum(storage.nbytes() for storage in found if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        self.peak = max(self.peak, self._alive())
        return made
