"""Models that wait in host memory and are on the device only while they work.

DiffSynth's units say which models they need next by `pipeline.load_models_to_device(names)`; `OffloadedModels` answers
that call. The host's copy stays where it is, so going back costs nothing. The text encoder, whose blocks are all alike,
need not come as a whole: `stream_blocks` has two of them there at a time. Leaves out DiffSynth's own VRAM management.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F


class OffloadedModels:
    """Some models of a pipeline, each wholly on the device or wholly on the host."""

    def __init__(self, models: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        """`models`: by the pipeline's names, now on the host."""
        self._models = dict(models)
        self._device = device
        self._hosted = {
            name: [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
            for name, model in models.items()
        }
        self._on_device: set[str] = set()

    def load(self, names: Iterable[str]) -> None:
        """Moves the named models onto the device, and the others off it first, so that they need not fit together."""
        wanted = self._models.keys() & set(names)
        for name in self._on_device - wanted:
            for tensor, host in self._hosted[name]:
                tensor.data = host
        arriving = wanted - self._on_device
        self._on_device = wanted  # also what only a part of has come, should there be no room for more
        try:
            for name in arriving:
                for tensor, host in self._hosted[name]:
                    tensor.data = host.to(self._device, non_blocking=True)
        except BaseException:
            self.load([])
            raise


def stream_blocks(encoder: Any, device: torch.device) -> None:
    """Has a `WanTextEncoder` that is in (pinned) host memory work on the device, with two of its blocks there at most.

    The next block comes while one is at work. Tokens are looked up on the host, whose table is a fifth of the encoder.
    """
    encoder.norm.to(device)
    table = encoder.token_embedding.weight
    encoder.token_embedding.forward = lambda ids: F.embedding(ids.cpu(), table).to(device)
    streamed = _StreamedBlocks(list(encoder.blocks), device)
    for index, block in enumerate(encoder.blocks):
        block.forward = functools.partial(streamed.run, index, block.forward)


class _StreamedBlocks:
    """Blocks of equal shapes, called in their order; each is in one of two places on the device when it is."""

    def __init__(self, blocks: list[torch.nn.Module], device: torch.device) -> None:
        self._device = device
        self._tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
        self._hosted = [[tensor.data for tensor in tensors] for tensors in self._tensors]
        # Copies are made beside the work, in a stream of their own.
        self._lane = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: list[list[torch.Tensor]] = []
        self._arrived: list[torch.cuda.Event] = []

    def run(self, index: int, forward: Callable[..., torch.Tensor], *arguments: Any, **named: Any) -> torch.Tensor:
        if index == 0:
            self._begin()
        try:
            if self._lane is not None:
                torch.cuda.current_stream().wait_event(self._arrived[index])
            self._put(index, self._places[index % 2])
            result = forward(*arguments, **named)
            self._put(index, self._hosted[index])
            if index + 2 < len(self._tensors):
                self._fetch(index + 2)
        except BaseException:
            self._put(index, self._hosted[index])
            self._end()
            raise
        if index + 1 == len(self._tensors):
            self._end()
        return result

    def _begin(self) -> None:
        self._end()  # a call that was broken off
        self._places = [[torch.empty_like(host, device=self._device) for host in self._hosted[0]] for _ in range(2)]
        for index in range(min(2, len(self._tensors))):
            self._fetch(index)

    def _fetch(self, index: int) -> None:
        """Has a block come to its place, once what was called so far is done with it."""
        if self._lane is None:
            self._copy(index)
            return
        self._lane.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._lane):
            self._copy(index)
            self._arrived.append(self._lane.record_event())

    def _copy(self, index: int) -> None:
        for place, host in zip(self._places[index % 2], self._hosted[index], strict=True):
            place.copy_(host, non_blocking=True)

    def _put(self, index: int, values: list[torch.Tensor]) -> None:
        for tensor, value in zip(self._tensors[index], values, strict=True):
            tensor.data = value

    def _end(self) -> None:
        """Gives the places back; not before what is on its way has come."""
        if self._lane is not None:
            torch.cuda.current_stream().wait_stream(self._lane)
        self._places, self._arrived = [], []
