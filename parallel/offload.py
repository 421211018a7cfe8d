"""Models that wait in host memory and are on the device only while they work.

DiffSynth's units say which models they need next by `pipeline.load_models_to_device(names)`; this answers that call.
The host's copy stays where it is, so going back costs nothing. Leaves out DiffSynth's own VRAM management.
"""

from collections.abc import Iterable, Mapping

import torch


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
        for name in wanted - self._on_device:
            for tensor, host in self._hosted[name]:
                tensor.data = host.to(self._device, non_blocking=True)
        self._on_device = wanted
