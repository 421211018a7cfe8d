"""DiffSynth's VRAM management, for one rank: layers wait in host memory, and stay on the device while there is room.

Owns which layers of which models are managed. Of a DiT these are the linear layers of its blocks, 99 % of it: what is
left is used by the ranks' own forward without calling the module that owns it. The encoders are managed as DiffSynth
itself does. Leaves out the layers' own behaviour (`diffsynth.core.vram.layers`).
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffsynth.configs import VERSION_CHECKER_MAPS, VRAM_MANAGEMENT_MODULE_MAPS
from diffsynth.core.vram.layers import (
    AutoTorchModule,
    AutoWrappedLinear,
    AutoWrappedModule,
    enable_vram_management,
    enable_vram_management_recursively,
)

DITS = ("dit", "dit2")
MANAGED = (*DITS, "text_encoder", "image_encoder", "audio_encoder")


def manage_model(
    attribute: str, model_class: str, module: torch.nn.Module, device: torch.device, *, limit_gib: float | None
) -> torch.nn.Module:
    """Puts a model that is on the host under management. Returns it, or what stands in its place.

    Layers are moved to the device while less than `limit_gib` of it is in use, by anybody; None: always.
    """
    dtype = next(module.parameters()).dtype
    host = torch.device("cpu")
    places = {
        f"{state}_{what}": value
        for state, place in (("offload", host), ("onload", host), ("preparing", device), ("computation", device))
        for what, value in (("dtype", dtype), ("device", place))
    }
    if attribute in DITS:
        for index, block in enumerate(module.get_submodule("blocks").children()):
            enable_vram_management_recursively(
                block, {torch.nn.Linear: AutoWrappedLinear}, places, vram_limit=limit_gib, name_prefix=f"blocks.{index}"
            )
        managed = {id(tensor) for each in _managed_layers(module) for tensor in (*each.parameters(), *each.buffers())}
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in managed:
                tensor.data = tensor.data.to(device)
        return module
    names = VRAM_MANAGEMENT_MODULE_MAPS.get(model_class, {})
    if model_class in VERSION_CHECKER_MAPS:
        names = VERSION_CHECKER_MAPS[model_class]()
    module_map = {_load_name(source): _load_name(target) for source, target in names.items()}
    wrapped: torch.nn.Module = enable_vram_management(
        module, module_map or {type(module): AutoWrappedModule}, vram_config=places, vram_limit=limit_gib
    )
    return wrapped


class ManagedModels:
    """Answers `pipeline.load_models_to_device`: DiffSynth's own, but that it works without a GPU too."""

    def __init__(self, models: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        self._layers = {name: _managed_layers(model) for name, model in models.items()}
        self._device = device

    def load(self, names: Iterable[str]) -> None:
        """Lets the named models' layers onto the device, and takes the others' off it."""
        wanted = set(names)
        for name, layers in self._layers.items():
            if name not in wanted:
                for layer in layers:
                    layer.offload()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the layers look at how full the device is, freed memory that is kept included
        for name in wanted & self._layers.keys():
            for layer in self._layers[name]:
                layer.onload()


def _managed_layers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, AutoTorchModule)]


def _load_name(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)
