"""Published checkpoints without their weights: real names, shapes and sizes, in files of no size on disk.

The layouts come from DiffSynth's own classes and registry, on the meta device; the files are sparse, a header
and then a hole.
"""

import functools
import importlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffsynth.configs import MODEL_CONFIGS
from diffsynth.models.wan_video_image_encoder import clip_xlm_roberta_vit_h_14

from parallel.layouts import Layout
from parallel.profile import ModelPart, ModelProfile
from parallel.tiny import audio_encoder_layout, textual_layout

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}

MODEL_NAMES = {
    "dit": "wan_video_dit",
    "dit_high_noise": "wan_video_dit",
    "dit_low_noise": "wan_video_dit",
    "text_encoder": "wan_video_text_encoder",
    "vae": "wan_video_vae",
    "image_encoder": "wan_video_image_encoder",
    "audio_encoder": "wans2v_audio_encoder",
    "motion_controller": "wan_video_motion_controller",
}


def registry_entry(part: ModelPart) -> dict[str, Any]:
    """DiffSynth's own entry for the checkpoint that `part` claims to be."""
    entries = [entry for entry in MODEL_CONFIGS if entry["model_hash"] == part.model_hash]
    (entry,) = [entry for entry in entries if entry["model_name"] == MODEL_NAMES[part.role]]
    return dict(entry)


def published_layout(part: ModelPart) -> Layout:
    """The names and shapes in the published file: the model's, with DiffSynth's conversion undone."""
    return dict(_published_layout(replace(part, files=(), source="")))


@functools.cache  # many profiles have the same encoder and VAE
def _published_layout(part: ModelPart) -> Layout:
    entry = registry_entry(part)
    if part.role == "image_encoder":
        # `WanImageEncoder()` insists on the CPU: 632 million random numbers. This is its inside.
        clip = clip_xlm_roberta_vit_h_14(device="meta")
        textual = textual_layout(vocab_size=250002, max_text_len=514, dim=1024, num_layers=24, out_dim=1024)
        return _shapes(clip) | textual
    model = _on_meta(entry)
    if part.role == "vae":
        return {name.removeprefix("model."): shape for name, shape in _shapes(model).items()}
    if part.role == "audio_encoder":
        return audio_encoder_layout(model.model)
    vace = [each for each in MODEL_CONFIGS if each["model_hash"] == part.model_hash and "vace" in each["model_name"]]
    return _shapes(model) | (_shapes(_on_meta(vace[0])) if vace else {})


def _on_meta(entry: dict[str, Any]) -> Any:
    module, _, name = entry["model_class"].rpartition(".")
    with torch.device("meta"):
        return getattr(importlib.import_module(module), name)(**entry.get("extra_kwargs", {}))


def _shapes(model: torch.nn.Module) -> Layout:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_sparse(path: Path, layout: Layout, *, dtype: str = "BF16") -> None:
    """A valid safetensors file of `layout` whose data is a hole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in layout.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        os.truncate(file.fileno(), 8 + len(raw) + end)


def write_sparse_folder(profile: ModelProfile, folder: Path) -> Path:
    """A whole model folder as published, shards split by size, with a tokenizer of no content."""
    for part in profile.parts:
        layout = published_layout(part)
        total = sum(math.prod(shape) for shape in layout.values())
        shards: list[Layout] = [{} for _ in part.files]
        before = 0
        for name, shape in layout.items():
            shards[min(before * len(shards) // total, len(shards) - 1)][name] = shape
            before += math.prod(shape)
        for file, shard in zip(part.files, shards, strict=True):
            write_sparse(folder / file, shard)
    for place in (profile.tokenizer, profile.audio_processor):
        if place is not None:
            (folder / place).mkdir(parents=True, exist_ok=True)
            for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "vocab.json"):
                (folder / place / name).write_text("{}")
    return folder
