"""The models that a checkpoint holds: DiffSynth's classes, built without weights.

Owns the way from a part of a profile to DiffSynth's modules and to the names that their weights have in the files.
Leaves out reading the weights (`loading.py`) and where they go (`model.py`).
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from diffsynth.configs import MODEL_CONFIGS
from diffsynth.core.vram.initialization import skip_model_initialization

from parallel.layouts import Layout
from parallel.profile import ModelPart
from parallel.tiny_registry import register_tiny_models

# DiffSynth's names of models, and the pipeline's attributes that they become, in the order in which they are loaded;
# as in `WanVideoPipeline.from_pretrained` of diffsynth 2.1.12.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "wan_video_text_encoder": ("text_encoder",),
    "wan_video_dit": ("dit", "dit2"),
    "wan_video_vae": ("vae",),
    "wan_video_image_encoder": ("image_encoder",),
    "wan_video_motion_controller": ("motion_controller",),
    "wan_video_vace": ("vace", "vace2"),
    "wan_video_vap": ("vap",),
    "wans2v_audio_encoder": ("audio_encoder",),
    "wan_video_animate_adapter": ("animate_adapter",),
}


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """One of DiffSynth's models, its parameters on the meta device; `stored_names`: by parameter, as in the file."""

    model_name: str
    model_class: str
    module: torch.nn.Module
    stored_names: dict[str, str]


def build_models(part: ModelPart, layout: Layout) -> list[BuiltModel]:
    """The models of a part, most often one; `layout`: the names and shapes in its files.

    Raises ValueError when DiffSynth does not know the part, or when its names do not fit the model's.
    """
    entries = [entry for entry in MODEL_CONFIGS if entry["model_hash"] == part.model_hash]
    if not entries:
        raise ValueError(f"{part.role}: DiffSynth does not know a model of the layout {part.model_hash}")
    return [_build(entry, part, layout) for entry in entries]


def _build(entry: dict[str, Any], part: ModelPart, layout: Layout) -> BuiltModel:
    with skip_model_initialization():
        module: torch.nn.Module = _load_name(entry["model_class"])(**entry.get("extra_kwargs", {}))
    # Wan's converters only rename, so they can be run on the names alone, as DiffSynth's `DiskMap` does.
    stored = {name: name for name in layout}
    if "state_dict_converter" in entry:
        stored = _load_name(entry["state_dict_converter"])(stored)
    expected = module.state_dict()
    different = sorted(stored.keys() ^ expected.keys())
    if different:
        raise ValueError(f"{part.role}: {different[0]} is not in both the files and {entry['model_class']}")
    for name, tensor in expected.items():
        if tuple(tensor.shape) != layout[stored[name]]:
            raise ValueError(f"{part.role}: {name} is {list(tensor.shape)}, in the files {list(layout[stored[name]])}")
    return BuiltModel(
        model_name=entry["model_name"], model_class=entry["model_class"], module=module, stored_names=stored
    )


def _load_name(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def layout_of(part: ModelPart) -> Layout:
    """Names and shapes of a part's tensors without its files, from DiffSynth's classes; as its modules name them."""
    register_tiny_models()
    found: Layout = {}
    for entry in MODEL_CONFIGS:
        if entry["model_hash"] == part.model_hash:
            with skip_model_initialization():
                module: torch.nn.Module = _load_name(entry["model_class"])(**entry.get("extra_kwargs", {}))
            found |= {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return found
