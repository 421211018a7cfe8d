"""A tiny model with two experts, as Wan 2.2 A14B has, and LoRA files for it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

SHARD = "diffusion_pytorch_model-0000{}-of-00002.safetensors"
Tensors = dict[str, Any]


def write_two_experts(models: Path, folder: Path) -> Path:
    """Writes `folder/two-experts`, whose DiTs come from tiny-t2v, and its profile beside it, which it returns."""
    target = folder / "two-experts"
    source = models / "tiny-t2v"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    dit: Tensors = {}
    for shard in sorted(source.glob("diffusion_pytorch_model*.safetensors")):
        dit |= load_file(shard)
    names = sorted(dit)
    for expert, factor in (("high_noise_model", 1.0), ("low_noise_model", 0.9)):
        (target / expert).mkdir()
        for number, part in ((1, names[::2]), (2, names[1::2])):
            save_file({name: dit[name] * np.float32(factor) for name in part}, target / expert / SHARD.format(number))
    profile = (Path("parallel/profiles/tiny-t2v.toml")).read_text()
    head, *parts = profile.split("[[parts]]")
    experts = "".join(
        "[[parts]]\n"
        f'role = "dit_{noise}_noise"\n'
        f'files = ["{noise}_noise_model/{SHARD.format(1)}", "{noise}_noise_model/{SHARD.format(2)}"]\n'
        'model_hash = "d902a6ce26e2a99bef5452029d5a7781"\n\n'
        for noise in ("high", "low")
    )
    others = "".join(f"[[parts]]{part}" for part in parts if 'role = "dit"' not in part)
    head = head.replace('name = "tiny-t2v"', 'name = "two-experts"')
    head = head.replace("[defaults]", "switch_boundary = 0.875\n\n[defaults]")
    path = folder / "two-experts.toml"
    path.write_text(head + experts + others)
    return path


def write_loras(folder: Path, *, dim: int = 288, ffn_dim: int = 384, num_layers: int = 4) -> None:
    """Writes a LoRA in PEFT's form and one in two forms of kohya's: with dots, as DiffSynth reads it, and its own."""
    folder.mkdir()
    random = np.random.default_rng(3)

    def matrix(*shape: int) -> Any:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    attention = [
        f"blocks.{n}.{kind}_attn.{name}" for n in range(num_layers) for kind in ("self", "cross") for name in "qkvo"
    ]
    peft: Tensors = {}
    for layer in attention:
        peft[f"diffusion_model.{layer}.lora_A.default.weight"] = matrix(4, dim)
        peft[f"diffusion_model.{layer}.lora_B.default.weight"] = matrix(dim, 4)
    save_file(peft, folder / "peft.safetensors")
    dotted: Tensors = {}
    kohya: Tensors = {}
    for layer in [f"blocks.{n}.ffn.0" for n in range(num_layers)]:
        for end, value in (
            ("lora_down.weight", matrix(8, dim)),
            ("lora_up.weight", matrix(ffn_dim, 8)),
            ("alpha", np.array(4.0, dtype=np.float32)),
        ):
            dotted[f"{layer}.{end}"] = value
            kohya[f"lora_unet_{layer.replace('.', '_')}.{end}"] = value
    save_file(dotted, folder / "dotted.safetensors")
    save_file(kohya, folder / "kohya.safetensors")
