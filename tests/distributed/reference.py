"""The reference: DiffSynth's WanVideoPipeline called directly, in a process of its own.

Imports none of reeld but the tiny models' registration and shapes. Usage: reference.py CASES.json OUTPUT.safetensors
A case's `files` are opened as DiffSynth's examples open them: images by Pillow, videos by its own `VideoData`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffsynth.core import ModelConfig
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.utils.data import VideoData
from PIL import Image
from safetensors.torch import save_file

from parallel.tiny_registry import register_tiny_models
from tests.distributed.random_dit import random_dit

SPEECH = "wav2vec2-large-xlsr-53-english"


def load(folder: Path, dtype: str) -> WanVideoPipeline:
    dits = [
        sorted(str(path) for path in place.glob("diffusion_pytorch_model*.safetensors"))
        for place in (folder, folder / "high_noise_model", folder / "low_noise_model")
    ]
    names = (
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "Wan2.1_VAE.safetensors",
        "Wan2.2_VAE.safetensors",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
        "model.safetensors",
        f"{SPEECH}/model.safetensors",
    )
    others = [str(folder / name) for name in names if (folder / name).exists()]
    return WanVideoPipeline.from_pretrained(
        torch_dtype=getattr(torch, dtype),
        device="cpu",
        model_configs=[ModelConfig(path=path) for path in (*(shards for shards in dits if shards), *others)],
        tokenizer_config=ModelConfig(path=str(folder / "google/umt5-xxl")),
        audio_processor_config=ModelConfig(path=str(folder / SPEECH)) if (folder / SPEECH).exists() else None,
    )


def open_files(files: dict[str, str], *, height: int, width: int) -> dict[str, Any]:
    """By the name of the argument: an image, a list of frames (.mp4) or samples (.npy)."""
    opened: dict[str, Any] = {}
    for name, path in files.items():
        match Path(path).suffix:
            case ".mp4":
                opened[name] = VideoData(path, height=height, width=width).raw_data()
            case ".npy":
                opened[name] = np.load(path)
            case _:
                opened[name] = Image.open(path).convert("RGB")
    if "vace_reference_image" in opened:
        opened["vace_reference_image"] = opened["vace_reference_image"].resize((width, height))
    return opened


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    register_tiny_models()
    pipelines: dict[tuple[str, str], WanVideoPipeline] = {}
    frames = {}
    for case in cases:
        key = (case["model_folder"], case["dtype"])
        if key not in pipelines:
            pipelines[key] = load(Path(key[0]), key[1])
        pipeline = pipelines[key]
        own = pipeline.dit
        if case.get("dit"):
            pipeline.dit = random_dit(**case["dit"])
        arguments = case["arguments"]
        files = {"input_image": case["input_image"]} if case.get("input_image") else case.get("files", {})
        opened = open_files(files, height=arguments["height"], width=arguments["width"])
        video = pipeline(**opened, output_type="floatpoint", **arguments)
        frames[case["name"]] = video[0].permute(1, 2, 3, 0).float().contiguous()
        pipeline.dit = own
    save_file(frames, sys.argv[2])


if __name__ == "__main__":
    main()
