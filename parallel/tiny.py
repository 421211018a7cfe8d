"""Writes the tiny Wan models: real architectures, real key layouts, random but deterministic weights.

They exist so that everything else (loading, parallel generation, the daemon, the demo) runs for real on a
laptop. What they paint is coloured noise that depends on prompt, image and seed. The shapes live in
`tiny_registry.py`, the file names in the profiles `tiny-*`.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits, punctuation

import numpy as np
import torch
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_s2v import WanS2VModel
from diffsynth.models.wan_video_motion_controller import WanMotionControllerModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vace import VaceWanModel
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from parallel.layouts import Layout
from parallel.profile import ModelPart, load_profile
from parallel.tiny_registry import (
    CLIP_SHAPE,
    FLF2V_DIT_SHAPE,
    FUN_CAMERA_DIT_SHAPE,
    FUN_CONTROL_DIT_SHAPE,
    I2V_A14B_DIT_SHAPE,
    I2V_DIT_SHAPE,
    MOTION_CONTROLLER_SHAPE,
    S2V_DIT_SHAPE,
    T2V_DIT_SHAPE,
    TEXT_ENCODER_SHAPE,
    TI2V_DIT_SHAPE,
    VACE_DIT_SHAPE,
    VACE_SHAPE,
    TinyWanImageEncoder,
    TinyWanS2VAudioEncoder,
    TinyWanVideoVAE,
    TinyWanVideoVAE38,
)

# As published: the text encoder in bfloat16, CLIP in float16, the DiT and the VAE in float32.
_DTYPES = {"text_encoder": torch.bfloat16, "image_encoder": torch.float16}


# `reeld demo` needs these two only.
DEMO_MODELS = ("tiny-t2v", "tiny-i2v")
# Each tiny model with the shape of its DiT, by the name of its profile.
TINY_MODELS: dict[str, dict[str, object]] = {
    "tiny-t2v": T2V_DIT_SHAPE,
    "tiny-i2v": I2V_DIT_SHAPE,
    "tiny-t2v-a14b": T2V_DIT_SHAPE,
    "tiny-i2v-a14b": I2V_A14B_DIT_SHAPE,
    "tiny-flf2v": FLF2V_DIT_SHAPE,
    "tiny-ti2v": TI2V_DIT_SHAPE,
    "tiny-vace": VACE_DIT_SHAPE,
    "tiny-fun-control": FUN_CONTROL_DIT_SHAPE,
    "tiny-fun-camera": FUN_CAMERA_DIT_SHAPE,
    "tiny-s2v": S2V_DIT_SHAPE,
    "tiny-speedcontrol": T2V_DIT_SHAPE,
}


def write_tiny_model(folder: Path, names: Sequence[str] = tuple(TINY_MODELS)) -> list[Path]:
    """Write the model folders `folder/NAME`; the same bytes each time.

    Parts that several models share are written once and linked. Returns the folders. Existing files are replaced.
    """
    written: dict[tuple[str, str], Path] = {}
    folders = []
    for name in names:
        profile = load_profile(name)
        target = folder / name
        for part in profile.parts:
            # The files of a role are told apart by their layout alone: the weights follow from role and name.
            earlier = written.setdefault((part.role, part.model_hash), target / part.files[0])
            if len(part.files) == 1 and earlier != target / part.files[0]:
                _link(earlier, target / part.files[0])
            else:
                _write_part(target, part, published_layout(part.role, TINY_MODELS[name], vae38=name == "tiny-ti2v"))
        _write_tokenizer(target / profile.tokenizer)
        if profile.audio_processor is not None:
            _write_audio_processor(target / profile.audio_processor)
        folders.append(target)
    return folders


def published_layout(role: str, dit_shape: dict[str, object], *, vae38: bool = False) -> Layout:
    """Tensor names and shapes as a checkpoint of this role is published, before DiffSynth's conversion."""
    with torch.device("meta"):
        match role:
            case "dit" | "dit_high_noise" | "dit_low_noise":
                return _dit_layout(dit_shape)
            case "motion_controller":
                return _shapes(WanMotionControllerModel(**MOTION_CONTROLLER_SHAPE))
            case "text_encoder":
                return _shapes(WanTextEncoder(**TEXT_ENCODER_SHAPE))
            case "vae":
                return _shapes((TinyWanVideoVAE38() if vae38 else TinyWanVideoVAE()).model)
            case "audio_encoder":
                return audio_encoder_layout(TinyWanS2VAudioEncoder().model)
            case "image_encoder":
                textual = textual_layout(
                    vocab_size=CLIP_SHAPE["vocab_size"],
                    max_text_len=CLIP_SHAPE["max_text_len"],
                    dim=CLIP_SHAPE["text_dim"],
                    num_layers=CLIP_SHAPE["text_layers"],
                    out_dim=CLIP_SHAPE["embed_dim"],
                )
                return _shapes(TinyWanImageEncoder().model) | textual
    raise ValueError(f"no tiny model for the role {role}")


def _dit_layout(shape: dict[str, object]) -> Layout:
    if shape is S2V_DIT_SHAPE:
        return _shapes(WanS2VModel(**shape))
    layout = _shapes(WanModel(**shape))
    return layout | _shapes(VaceWanModel(**VACE_SHAPE)) if shape is VACE_DIT_SHAPE else layout


def audio_encoder_layout(model: torch.nn.Module) -> Layout:
    """A wav2vec2 model's layout as published: torch has since renamed the two halves of a normed weight."""
    halves = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    layout = _shapes(model)
    for now, then in halves.items():
        layout = {name.replace(now, then): shape for name, shape in layout.items()}
    return layout


def textual_layout(*, vocab_size: int, max_text_len: int, dim: int, num_layers: int, out_dim: int) -> Layout:
    """The textual half of the published CLIP file, which DiffSynth drops when it loads the file.

    Spelled out, because DiffSynth's `XLMRobertaWithHead` cannot be asked: a later class of the same name in
    its module replaces the block that it is made of.
    """
    layout: Layout = {
        "token_embedding.weight": (vocab_size, dim),
        "type_embedding.weight": (1, dim),
        "pos_embedding.weight": (max_text_len, dim),
    }
    for block in (f"blocks.{index}" for index in range(num_layers)):
        for name in ("q", "k", "v", "o"):
            layout |= {f"{block}.attn.{name}.weight": (dim, dim), f"{block}.attn.{name}.bias": (dim,)}
        layout |= {f"{block}.ffn.0.weight": (4 * dim, dim), f"{block}.ffn.0.bias": (4 * dim,)}
        layout |= {f"{block}.ffn.2.weight": (dim, 4 * dim), f"{block}.ffn.2.bias": (dim,)}
        for name in ("norm1", "norm2"):
            layout |= {f"{block}.{name}.weight": (dim,), f"{block}.{name}.bias": (dim,)}
    middle = (dim + out_dim) // 2
    layout |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    layout |= {"head.0.weight": (middle, dim), "head.2.weight": (out_dim, middle)}
    return {f"textual.{name}": shape for name, shape in layout.items()}


def _shapes(model: torch.nn.Module) -> Layout:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _write_part(folder: Path, part: ModelPart, layout: Layout) -> None:
    dtype = _DTYPES.get(part.role, torch.float32)
    names = list(layout)
    shard_length = math.ceil(len(names) / len(part.files))
    for index, file in enumerate(part.files):
        shard = names[index * shard_length : (index + 1) * shard_length]
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: _weights(part.role, name, layout[name]).to(dtype) for name in shard}
        # One key of metadata only: safetensors keeps them in a hash map and writes several in any order.
        save_file(tensors, path, metadata={"format": "pt"})
        # safetensors leaves its temporary file's 0600; a daemon under a user of its own must read the model.
        path.chmod(0o644)


def _link(existing: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.link(existing, path)


def _weights(role: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Deterministic numbers for one tensor, float32.

    Each tensor has a stream of its own, seeded by its name. The numbers are uniform: those come from integer
    arithmetic, so they are the same bits on every CPU, which vectorised normal variates are not.
    """
    if name.endswith(("gamma", "norm.weight")) or (len(shape) == 1 and name.endswith("weight")):
        return torch.ones(shape)
    if name == "casual_audio_encoder.weights":  # they weigh 25 layers, and are divided by their sum
        return torch.full(shape, 0.5)
    seed = int.from_bytes(hashlib.sha256(f"reeld/{role}/{name}".encode()).digest()[:8], "little")
    uniform = np.random.Generator(np.random.PCG64(seed)).random(shape, dtype=np.float32)
    deviation = _deviation(role, name, shape)
    return torch.from_numpy(np.asarray((uniform * 2 - 1) * np.float32(math.sqrt(3) * deviation)))


def _deviation(role: str, name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation that keeps activations near one, so that frames neither saturate nor go flat."""
    if name.endswith("bias"):
        return 0.02
    if name.endswith("emb_pos"):
        return 0.5
    if name.endswith(("modulation", "cls_embedding", "pos_embedding")):
        return 1 / math.sqrt(shape[-1])
    if name.endswith("embedding.weight") and len(shape) == 2:
        return 1.0 if "token" in name else 0.2
    gain = next((gain for ending, gain in _GAINS.get(role, {}).items() if name.endswith(ending)), 1.0)
    return gain / math.sqrt(math.prod(shape[1:]))


# By the end of the published name. The prompt must be seen in the frames, so that a test can tell a wrong
# one; the VAE's residual branches are small, so that a rounding difference in bfloat16 does not grow from
# layer to layer.
_GAINS: dict[str, dict[str, float]] = {
    "dit": {"cross_attn.o.weight": 3.0},
    "vae": {"residual.6.weight": 0.3, "proj.weight": 0.3, "decoder.head.2.weight": 0.5},
}


def _vocabulary() -> Iterator[tuple[str, float]]:
    """Pieces and log probabilities of the Unigram model; built, since training is not repeatable."""
    yield from (("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -6.0))
    for character in ascii_lowercase + ascii_uppercase + digits + punctuation:
        yield character, -8.0
    for word in _WORDS.split():
        yield f"▁{word}", -4.0 - len(word) / 10
    for ending in (
        "ing",
        "ed",
        "er",
        "ly",
        "es",
        "tion",
        "al",
        "en",
        "th",
        "ou",
        "st",
        "an",
        "in",
        "re",
        "on",
    ):
        yield ending, -6.0


_WORDS = """
a an the of in on at to and with over under through from by for is are it its his her one two three small big
old young red green blue white black yellow bright dark slow fast cat dog fox bird horse fish man woman child
robot car boat train house tree forest snow rain sea river mountain city street sky sun moon night day light
water fire wind run runs running walk walks walking fly flies swim swims jump jumps dance dances turn turns
look looks camera close up wide shot video film style painting photo quality low worst best blurry static
"""


def _write_tokenizer(folder: Path) -> None:
    """A Unigram tokenizer with T5's habits: metaspace, `<pad>` and `</s>` first, `</s>` after each text."""
    tokenizer = Tokenizer(models.Unigram(list(_vocabulary()), unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)


def _write_audio_processor(folder: Path) -> None:
    """wav2vec2's processor: sound to unit variance, and a vocabulary of letters that speech-to-video never uses."""
    folder.mkdir(parents=True, exist_ok=True)
    features = {
        "do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
        "padding_side": "right", "padding_value": 0.0, "return_attention_mask": True, "sampling_rate": 16000,
    }  # fmt: skip
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", "-", *ascii_lowercase]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    for name, content in (
        ("preprocessor_config.json", features),
        ("vocab.json", {piece: index for index, piece in enumerate(pieces)}),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", special | {"tokenizer_class": "Wav2Vec2CTCTokenizer", "do_lower_case": True}),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
