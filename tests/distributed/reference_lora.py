"""DiffSynth's own `load_lora` (fused): reference_lora.py CASES.json OUTPUT.safetensors, a process without our code."""

import json
import sys
from pathlib import Path

from diffsynth.core import ModelConfig
from diffsynth.pipelines.wan_video import WanVideoPipeline
from safetensors.torch import save_file

from parallel.tiny_registry import register_tiny_models


def load(folder: Path) -> WanVideoPipeline:
    import torch

    experts = [
        sorted(str(path) for path in (folder / f"{noise}_noise_model").glob("*.safetensors"))
        for noise in ("high", "low")
    ]
    others = [str(folder / name) for name in ("models_t5_umt5-xxl-enc-bf16.safetensors", "Wan2.1_VAE.safetensors")]
    return WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[ModelConfig(path=path) for path in [*experts, *others]],
        tokenizer_config=ModelConfig(path=str(folder / "google/umt5-xxl")),
    )


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    register_tiny_models()
    frames = {}
    for case in cases["cases"]:
        pipeline = load(Path(cases["folder"]))  # fused LoRAs cannot be taken out again
        for lora in case["loras"]:
            for name in {"both": ("dit", "dit2"), "high_noise": ("dit",), "low_noise": ("dit2",)}[lora["target"]]:
                pipeline.load_lora(getattr(pipeline, name), lora["reference"], alpha=lora["strength"])
        video = pipeline(output_type="floatpoint", **cases["arguments"], **case["arguments"])
        frames[case["name"]] = video[0].permute(1, 2, 3, 0).float().contiguous()
    save_file(frames, sys.argv[2])


if __name__ == "__main__":
    main()
