"""A whole model folder at its real shapes, with random weights: python -m benchmarks.gpu.random_model PROFILE FOLDER.

Weights cannot be had where this runs. The folder passes reeld's own check, so a daemon serves it; what it generates is
noise, in the time and the memory that the model takes. The tokenizer is the tiny model's.
"""

import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from parallel.parts import layout_of
from parallel.profile import load_profile
from parallel.tiny import write_tiny_model


def main() -> None:
    profile, folder = load_profile(sys.argv[1]), Path(sys.argv[2])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for part in profile.parts:
        begun = time.monotonic()
        # A VAE's file lacks the prefix that its module's names have.
        shapes = [(name.removeprefix("model.") if part.role == "vae" else name, shape)
                  for name, shape in layout_of(part).items()]  # fmt: skip
        share = math.ceil(len(shapes) / len(part.files))
        for number, file in enumerate(part.files):
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            own = shapes[number * share : (number + 1) * share]
            save_file({name: _random(name, shape, device) for name, shape in own}, path)
            print(f"{path}: {path.stat().st_size / 1e9:.2f} GB, {time.monotonic() - begun:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_tiny_model(Path(scratch))
        tiny = load_profile("tiny-t2v")
        shutil.copytree(Path(scratch) / "tiny-t2v" / tiny.tokenizer, folder / profile.tokenizer)


def _random(name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Numbers of the size that training gives: norms of one, the rest by the number of inputs."""
    tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if "norm" in name or name.endswith("gamma"):
        tensor.fill_(0 if name.endswith("bias") else 1)
    else:
        inputs = max(1, tensor[0].numel()) if tensor.ndim > 1 else 2500
        tensor.normal_(std=inputs**-0.5)
    return tensor.cpu()


if __name__ == "__main__":
    main()
