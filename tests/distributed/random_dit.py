"""A transformer with random weights, the same in the reference's process and in every rank. Imports DiffSynth only."""

from typing import Any

import torch
from diffsynth.models.wan_video_dit import WanModel

HEAD_DIM = 24  # the smallest that the three axes of RoPE can share out evenly


def random_dit(*, num_heads: int, num_layers: int, seed: int) -> Any:
    """A text-to-video WanModel for the tiny model's text encoder and VAE, float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dit = WanModel(
            dim=HEAD_DIM * num_heads,
            in_dim=16,
            ffn_dim=3 * HEAD_DIM * num_heads,
            out_dim=16,
            text_dim=64,
            freq_dim=64,
            eps=1e-6,
            patch_size=(1, 2, 2),
            num_heads=num_heads,
            num_layers=num_layers,
            has_image_input=False,
        )
    return dit.eval().requires_grad_(False)
