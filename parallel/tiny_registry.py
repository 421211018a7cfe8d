"""Makes DiffSynth recognise the tiny Wan models that `parallel/tiny.py` writes.

DiffSynth finds the class of a checkpoint by a hash of its tensor names and shapes in `MODEL_CONFIGS`; this
module adds the tiny shapes, and the two classes whose width the real ones fix. It imports DiffSynth and torch
and nothing of reeld's, so that a reference process can load the same models without any of our code. The
numbers in the files are not its business.
"""

from typing import Any

import torch
from diffsynth.configs import MODEL_CONFIGS
from diffsynth.models.wan_video_image_encoder import WanImageEncoder, clip_xlm_roberta_vit_h_14
from diffsynth.models.wan_video_vae import VideoVAE_, WanVideoVAE

DIT_SHAPE: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "dim": 288,
    # The head dimension, 24, must split into three even parts for the 3D RoPE; 12 heads divide by 2, 3, 4, 6.
    "num_heads": 12,
    "ffn_dim": 384,
    "num_layers": 4,
    "freq_dim": 64,
    "text_dim": 64,
    "out_dim": 16,
    "eps": 1e-06,
}
T2V_DIT_SHAPE: dict[str, Any] = DIT_SHAPE | {"in_dim": 16, "has_image_input": False}
# 36 = 16 latent channels + 4 of the mask + 16 of the encoded image, as in Wan2.1 I2V.
I2V_DIT_SHAPE: dict[str, Any] = DIT_SHAPE | {"in_dim": 36, "has_image_input": True}
TEXT_ENCODER_SHAPE: dict[str, Any] = {
    "vocab": 512,
    "dim": 64,
    "dim_attn": 64,
    "dim_ffn": 128,
    "num_heads": 4,
    "num_layers": 2,
    "num_buckets": 32,
    "shared_pos": False,
    "dropout": 0.0,
}
VAE_WIDTH = 8
CLIP_SHAPE: dict[str, Any] = {
    "embed_dim": 64,
    # The DiT's image embedding is MLP(1280, ...), so the width stays; the pipeline drops the last block, so
    # two layers are the fewest with an attention in use.
    "vision_layers": 2,
    "vision_mlp_ratio": 1 / 16,
    # The textual half is in the file, as published, and in no model: DiffSynth drops it.
    "vocab_size": 512,
    "max_text_len": 66,
    "text_dim": 64,
    "text_heads": 4,
    "text_layers": 2,
}


class TinyWanVideoVAE(WanVideoVAE):  # type: ignore[misc]  # diffsynth has no types
    """Wan's VAE with 8 base channels instead of 96, and the same 16 latent channels and 8x4 compression."""

    def __init__(self, z_dim: int = 16) -> None:
        # The parent's latent means and deviations are wanted, its 127 million parameters are not: on the meta
        # device these cost nothing.
        super().__init__(z_dim=z_dim)
        self.model = VideoVAE_(dim=VAE_WIDTH, z_dim=z_dim).eval().requires_grad_(False)


class TinyWanImageEncoder(WanImageEncoder):  # type: ignore[misc]  # diffsynth has no types
    """Wan's CLIP image encoder with two narrow blocks instead of 32; 224 pixels, 257 tokens of width 1280."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.model, self.transforms = clip_xlm_roberta_vit_h_14(
            pretrained=False, return_transforms=True, return_tokenizer=False, dtype=torch.float32,
            device="cpu", **CLIP_SHAPE,
        )  # fmt: skip


_CONVERTERS = "diffsynth.utils.state_dict_converters"
TINY_MODEL_CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "model_hash": "d902a6ce26e2a99bef5452029d5a7781",
        "model_name": "wan_video_dit",
        "model_class": "diffsynth.models.wan_video_dit.WanModel",
        "extra_kwargs": T2V_DIT_SHAPE,
    },
    {
        "model_hash": "11c9cded74124462961323f7c8f2f444",
        "model_name": "wan_video_dit",
        "model_class": "diffsynth.models.wan_video_dit.WanModel",
        "extra_kwargs": I2V_DIT_SHAPE,
    },
    {
        "model_hash": "bcbf522a0f89ab8f1ce926261a4e4c3c",
        "model_name": "wan_video_text_encoder",
        "model_class": "diffsynth.models.wan_video_text_encoder.WanTextEncoder",
        "extra_kwargs": TEXT_ENCODER_SHAPE,
    },
    {
        "model_hash": "cb16b9a02ae4539361b6cc6302ce413b",
        "model_name": "wan_video_vae",
        "model_class": "parallel.tiny_registry.TinyWanVideoVAE",
        "state_dict_converter": f"{_CONVERTERS}.wan_video_vae.WanVideoVAEStateDictConverter",
    },
    {
        "model_hash": "4049e7a9b344080aed104ff63a35ef67",
        "model_name": "wan_video_image_encoder",
        "model_class": "parallel.tiny_registry.TinyWanImageEncoder",
        "state_dict_converter": f"{_CONVERTERS}.wan_video_image_encoder.WanImageEncoderStateDictConverter",
    },
)


def register_tiny_models() -> None:
    """Add the tiny models to DiffSynth's registry, once a process."""
    known = {config["model_hash"] for config in MODEL_CONFIGS}
    MODEL_CONFIGS.extend(config for config in TINY_MODEL_CONFIGS if config["model_hash"] not in known)
