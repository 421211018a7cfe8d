"""The reference: DiffSynth's WanVideoPipeline called directly, in a process of its own.

Imports none of reeld but the tiny model's registration. Usage: reference.py CASES.json OUTPUT.safetensors
"""

import json
import sys
from pathlib import Path

import torch
from diffsynth.core import ModelConfig
from diffsynth.pipelines.wan_video import WanVideoPipeline
from PIL import Image
from safetensors.torch import save_file

from parallel.tiny_registry import register_tiny_models


def load(folder: Path, dtype: str) -> WanVideoPipeline:
    shards = sorted(str(path) for path in folder.glob("diffusion_pytorch_model*.safetensors"))
    names = (
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "Wan2.1_VAE.safetensors",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
    )
    others = [str(folder / name) for name in names if (folder / name).exists()]
    return WanVideoPipeline.from_pretrained(
        torch_dtype=getattr(torch, dtype),
        device="cpu",
        model_configs=[ModelConfig(path=shards), *(ModelConfig(path=path) for path in others)],
        tokenizer_config=ModelConfig(path=str(folder / "google/umt5-xxl")),
    )


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    register_tiny_models()
    pipelines: dict[tuple[str, str], WanVideoPipeline] = {}
    frames = {}
    for case in cases:
        key = (case["model_folder"], case["dtype"])
        if key not in pipelines:
            pipelines[key] = load(Path(key[0]), key[1])
        image = Image.open(case["input_image"]).convert("RGB") if case["input_image"] else None
        video = pipelines[key](input_image=image, output_type="floatpoint", **case["arguments"])
        frames[case["name"]] = video[0].permute(1, 2, 3, 0).float().contiguous()
    save_file(frames, sys.argv[2])


if __name__ == "__main__":
    main()
