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
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_, WanVideoVAE, WanVideoVAE38
from diffsynth.models.wav2vec import WanS2VAudioEncoder

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
_SHORT = DIT_SHAPE | {"num_layers": 2}
T2V_DIT_SHAPE: dict[str, Any] = DIT_SHAPE | {"in_dim": 16, "has_image_input": False}
# 36 = 16 latent channels + 4 of the mask + 16 of the encoded image, as in Wan2.1 I2V.
I2V_DIT_SHAPE: dict[str, Any] = DIT_SHAPE | {"in_dim": 36, "has_image_input": True}
# As Wan2.2 A14B: the image comes through the VAE alone, without CLIP. Two such DiTs are one model.
I2V_A14B_DIT_SHAPE: dict[str, Any] = _SHORT | {
    "in_dim": 36, "has_image_input": False, "require_clip_embedding": False,
}  # fmt: skip
FLF2V_DIT_SHAPE: dict[str, Any] = _SHORT | {"in_dim": 36, "has_image_input": True, "has_image_pos_emb": True}
# As Wan2.2 TI2V 5B: 48 latent channels, each token with a timestep of its own, the image in the latents.
TI2V_DIT_SHAPE: dict[str, Any] = _SHORT | {
    "in_dim": 48, "out_dim": 48, "has_image_input": False, "seperated_timestep": True,
    "require_clip_embedding": False, "require_vae_embedding": False, "fuse_vae_embedding_in_latents": True,
}  # fmt: skip
# 48 = 16 latent channels + 16 of the control video + 16 of an image, as Wan2.1 Fun V1.1 Control.
FUN_CONTROL_DIT_SHAPE: dict[str, Any] = _SHORT | {"in_dim": 48, "has_image_input": True, "has_ref_conv": True}
FUN_CAMERA_DIT_SHAPE: dict[str, Any] = _SHORT | {
    "in_dim": 32, "has_image_input": True, "add_control_adapter": True, "in_dim_control_adapter": 24,
}  # fmt: skip
VACE_DIT_SHAPE: dict[str, Any] = DIT_SHAPE | {"num_layers": 3, "in_dim": 16, "has_image_input": False}
# In the checkpoint of its DiT, as published: hints for the first and the last of the three blocks.
VACE_SHAPE: dict[str, Any] = {
    "vace_layers": (0, 2), "vace_in_dim": 96, "patch_size": (1, 2, 2), "has_image_input": False,
    "dim": 288, "num_heads": 12, "ffn_dim": 384, "eps": 1e-06,
}  # fmt: skip
AUDIO_DIM = 32
S2V_DIT_SHAPE: dict[str, Any] = DIT_SHAPE | {
    "patch_size": (1, 2, 2), "num_layers": 3, "in_dim": 16, "cond_dim": 16, "audio_dim": AUDIO_DIM,
    "num_audio_token": 4, "audio_inject_layers": [0, 2],
}  # fmt: skip
MOTION_CONTROLLER_SHAPE: dict[str, Any] = {"freq_dim": 64, "dim": 288}
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


class TinyWanVideoVAE38(WanVideoVAE38):  # type: ignore[misc]
    """Wan2.2's VAE with 8 base channels instead of 160 and 256; the same 48 latent channels, 16x4 compression."""

    def __init__(self, z_dim: int = 48) -> None:
        super().__init__(z_dim=z_dim, dim=VAE_WIDTH)
        self.model = VideoVAE38_(z_dim=z_dim, dim=VAE_WIDTH, dec_dim=VAE_WIDTH).eval().requires_grad_(False)


class TinyWanS2VAudioEncoder(WanS2VAudioEncoder):  # type: ignore[misc]
    """wav2vec2 with 24 layers, which speech-to-video wants, of width 32 instead of 1024."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        from transformers import Wav2Vec2Config, Wav2Vec2ForCTC  # a second of imports, for this model alone

        self.model = Wav2Vec2ForCTC(
            Wav2Vec2Config(
                hidden_size=AUDIO_DIM, intermediate_size=2 * AUDIO_DIM, num_hidden_layers=24, num_attention_heads=4,
                conv_dim=(AUDIO_DIM,) * 7, conv_bias=True, feat_extract_norm="layer", do_stable_layer_norm=True,
                num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=16, vocab_size=33,
            )
        ).eval()  # fmt: skip
        self.video_rate = 30


class TinyWanImageEncoder(WanImageEncoder):  # type: ignore[misc]  # diffsynth has no types
    """Wan's CLIP image encoder with two narrow blocks instead of 32; 224 pixels, 257 tokens of width 1280."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.model, self.transforms = clip_xlm_roberta_vit_h_14(
            pretrained=False, return_transforms=True, return_tokenizer=False, dtype=torch.float32,
            device="cpu", **CLIP_SHAPE,
        )  # fmt: skip


_CONVERTERS = "diffsynth.utils.state_dict_converters"
_OWN = "parallel.tiny_registry"


def _wan_dit(model_hash: str, shape: dict[str, Any], **more: str) -> dict[str, Any]:
    model_class = "diffsynth.models.wan_video_dit.WanModel"
    return {"model_hash": model_hash, "model_name": "wan_video_dit", "model_class": model_class,
            "extra_kwargs": shape, **more}  # fmt: skip


TINY_MODEL_CONFIGS: tuple[dict[str, Any], ...] = (
    _wan_dit("d902a6ce26e2a99bef5452029d5a7781", T2V_DIT_SHAPE),
    _wan_dit("11c9cded74124462961323f7c8f2f444", I2V_DIT_SHAPE),
    _wan_dit("c430dac9a11f3e7a08e29183ea278ad1", I2V_A14B_DIT_SHAPE),
    _wan_dit("a1d6a80f5a58549174f9189b516c6f3e", FLF2V_DIT_SHAPE),
    _wan_dit("7d1e1d7e2fe3b17c5f576471a27b6b87", TI2V_DIT_SHAPE),
    _wan_dit("14254554a08e6e4350729fe2912be5ba", FUN_CONTROL_DIT_SHAPE),
    _wan_dit("0320147c8d4c6ae444c834b54019b906", FUN_CAMERA_DIT_SHAPE),
    _wan_dit(
        "fead55178437c97de053e47ed4116e5a",
        VACE_DIT_SHAPE,
        state_dict_converter=f"{_CONVERTERS}.wan_video_dit.WanVideoDiTStateDictConverter",
    ),
    {
        "model_hash": "fead55178437c97de053e47ed4116e5a",
        "model_name": "wan_video_vace",
        "model_class": "diffsynth.models.wan_video_vace.VaceWanModel",
        "extra_kwargs": VACE_SHAPE,
        "state_dict_converter": f"{_CONVERTERS}.wan_video_vace.VaceWanModelDictConverter",
    },
    {
        "model_hash": "ce2d5e548a88efa974f9faa5e4b3daec",
        "model_name": "wan_video_dit",
        "model_class": "diffsynth.models.wan_video_dit_s2v.WanS2VModel",
        "extra_kwargs": S2V_DIT_SHAPE,
    },
    {
        "model_hash": "bae029084ed3a05bc6a4126f280fc6b8",
        "model_name": "wan_video_motion_controller",
        "model_class": "diffsynth.models.wan_video_motion_controller.WanMotionControllerModel",
        "extra_kwargs": MOTION_CONTROLLER_SHAPE,
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
        "model_class": f"{_OWN}.TinyWanVideoVAE",
        "state_dict_converter": f"{_CONVERTERS}.wan_video_vae.WanVideoVAEStateDictConverter",
    },
    {
        "model_hash": "7c683037cadf4bd6af15a48fb9e51d72",
        "model_name": "wan_video_vae",
        "model_class": f"{_OWN}.TinyWanVideoVAE38",
        "state_dict_converter": f"{_CONVERTERS}.wan_video_vae.WanVideoVAEStateDictConverter",
    },
    {
        "model_hash": "4049e7a9b344080aed104ff63a35ef67",
        "model_name": "wan_video_image_encoder",
        "model_class": f"{_OWN}.TinyWanImageEncoder",
        "state_dict_converter": f"{_CONVERTERS}.wan_video_image_encoder.WanImageEncoderStateDictConverter",
    },
    {
        "model_hash": "45f01704607054a4c51b815b34c60da1",
        "model_name": "wans2v_audio_encoder",
        "model_class": f"{_OWN}.TinyWanS2VAudioEncoder",
        "state_dict_converter": f"{_CONVERTERS}.wans2v_audio_encoder.WanS2VAudioEncoderStateDictConverter",
    },
)


def register_tiny_models() -> None:
    """Add the tiny models to DiffSynth's registry, once a process."""
    known = {config["model_hash"] for config in MODEL_CONFIGS}
    MODEL_CONFIGS.extend(config for config in TINY_MODEL_CONFIGS if config["model_hash"] not in known)
