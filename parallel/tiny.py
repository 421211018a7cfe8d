"""Writes the tiny Wan models: real architectures, real key layouts, random but deterministic weights.

They exist so that everything else (loading, parallel generation, the daemon, the demo) runs for real on a
laptop. What they paint is coloured noise that depends on prompt, image and seed. The shapes live in
`tiny_registry.py`, the file names in the profiles `tiny-t2v` and `tiny-i2v`.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits, punctuation

import numpy as np
import torch
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from parallel.layouts import Layout
from parallel.profile import ModelPart, load_profile
from parallel.tiny_registry import (
    CLIP_SHAPE,
    I2V_DIT_SHAPE,
    T2V_DIT_SHAPE,
    TEXT_ENCODER_SHAPE,
    TinyWanImageEncoder,
    TinyWanVideoVAE,
)

# As published: the text encoder in bfloat16, CLIP in float16, the DiT and the VAE in float32.
_DTYPES = {"text_encoder": torch.bfloat16, "image_encoder": torch.float16}


def write_tiny_model(folder: Path) -> list[Path]:
    """Write the model folders `folder/tiny-t2v` and `folder/tiny-i2v`; the same bytes each time.

    Returns the two folders. Existing files are replaced.
    """
    folders = []
    for name, dit_shape in (("tiny-t2v", T2V_DIT_SHAPE), ("tiny-i2v", I2V_DIT_SHAPE)):
        profile = load_profile(name)
        target = folder / name
        for part in profile.parts:
            _write_part(target, part, published_layout(part.role, dit_shape))
        _write_tokenizer(target / profile.tokenizer)
        folders.append(target)
    return folders


def published_layout(role: str, dit_shape: dict[str, object]) -> Layout:
    """Tensor names and shapes as a checkpoint of this role is published, before DiffSynth's conversion."""
    with torch.device("meta"):
        if role == "dit":
            return _shapes(WanModel(**dit_shape))
        if role == "text_encoder":
            return _shapes(WanTextEncoder(**TEXT_ENCODER_SHAPE))
        if role == "vae":
            return _shapes(TinyWanVideoVAE().model)
        if role == "image_encoder":
            textual = textual_layout(
                vocab_size=CLIP_SHAPE["vocab_size"],
                max_text_len=CLIP_SHAPE["max_text_len"],
                dim=CLIP_SHAPE["text_dim"],
                num_layers=CLIP_SHAPE["text_layers"],
                out_dim=CLIP_SHAPE["embed_dim"],
            )
            return _shapes(TinyWanImageEncoder().model) | textual
    raise ValueError(f"no tiny model for the role {role}")


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


def _weights(role: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Deterministic numbers for one tensor, float32.

    Each tensor has a stream of its own, seeded by its name. The numbers are uniform: those come from integer
    arithmetic, so they are the same bits on every CPU, which vectorised normal variates are not.
    """
    if name.endswith(("gamma", "norm.weight")) or (len(shape) == 1 and name.endswith("weight")):
        return torch.ones(shape)
    seed = int.from_bytes(hashlib.sha256(f"reeld/{role}/{name}".encode()).digest()[:8], "little")
    uniform = np.random.Generator(np.random.PCG64(seed)).random(shape, dtype=np.float32)
    deviation = _deviation(role, name, shape)
    return torch.from_numpy(np.asarray((uniform * 2 - 1) * np.float32(math.sqrt(3) * deviation)))


def _deviation(role: str, name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation that keeps activations near one, so that frames neither saturate nor go flat."""
    if name.endswith("bias"):
        return 0.02
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
