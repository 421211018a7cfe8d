"""Which layers of a DiT a LoRA file is for, read from its header alone.

Owns the usual ways of naming a LoRA's tensors (DiffSynth's, PEFT's, diffusers' and kohya's) and the check that they
fit the model. Pure Python, so that a job is refused before anything loads. Leaves out the numbers (`lora.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.layouts import Layout

# What may stand before a layer's own name: ComfyUI and lightx2v, PEFT, diffusers, DiffSynth.
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.", "module.", "dit.", "pipe.dit.")
_KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")
_MARKS = ((".lora_B.", ".lora_A."), (".lora_up.", ".lora_down."))
# diffusers' names of Wan's layers, as in DiffSynth's `WanVideoDiTFromDiffusers`.
_DIFFUSERS_NAMES = (
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".to_out.0", ".o"),
    (".add_k_proj", ".k_img"),
    (".add_v_proj", ".v_img"),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("proj_out", "head.head"),
)
# Weights that are not a product of two matrices; to leave their part out would be another picture, not a weaker one.
_OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
}

# The DiTs that a target means, by DiffSynth's names; a model with one DiT has no `dit2`.
TARGETS = {"both": ("dit", "dit2"), "high_noise": ("dit",), "low_noise": ("dit2",)}

LayerShapes = Mapping[str, tuple[int, int]]


class LoraError(Exception):
    """Raised when a LoRA cannot be used with a model; one line that says why."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The names of one layer's tensors in the file: `up` (out, rank), `down` (rank, in) and a scalar `alpha`."""

    up: str
    down: str
    alpha: str | None


@dataclass(frozen=True, slots=True)
class LoraMatch:
    """What of a LoRA fits a model: the pairs by layer, and the names of the tensors that nothing is done with."""

    pairs: dict[str, LoraPair]
    unused: tuple[str, ...]


def match_lora(layout: Layout, layers: LayerShapes) -> LoraMatch:
    """Finds the layers of a DiT that a LoRA's tensors are for. `layers`: (out, in) of each linear layer, by name.

    Layers that the model has not are left out, as DiffSynth does: LoRAs for image to video are used with text to
    video. Raises LoraError when nothing fits, when a shape does not, and for what is not a LoRA.
    """
    for name in layout:
        if (method := _OTHER_METHODS.get(name.rpartition(".")[2])) is not None:
            raise LoraError(f"{name}: this is a {method}; only LoRAs are supported")
    by_underscores = {name.replace(".", "_"): name for name in layers}
    pairs: dict[str, LoraPair] = {}
    used: set[str] = set()
    for key in layout:
        for up_mark, down_mark in _MARKS:
            prefix, mark, _ = key.partition(up_mark)
            layer = _layer_name(prefix, layers, by_underscores) if mark else None
            if layer is None:
                continue
            pair = LoraPair(
                up=key,
                down=key.replace(up_mark, down_mark),
                alpha=f"{prefix}.alpha" if f"{prefix}.alpha" in layout else None,
            )
            if layer in pairs:
                raise LoraError(f"{key}: a second pair of matrices for {layer}")
            _check_pair(layer, pair, layout, layers[layer])
            pairs[layer] = pair
            used |= {pair.up, pair.down} | ({pair.alpha} if pair.alpha else set())
    if not pairs:
        raise LoraError("none of its tensors is a LoRA of a layer that this model has")
    return LoraMatch(pairs=pairs, unused=tuple(sorted(layout.keys() - used)))


def _layer_name(prefix: str, layers: LayerShapes, by_underscores: Mapping[str, str]) -> str | None:
    for kohya in _KOHYA_PREFIXES:
        if prefix.startswith(kohya):
            return by_underscores.get(prefix.removeprefix(kohya))
    name, before = prefix, ""
    while name != before:
        before = name
        for each in _PREFIXES:
            name = name.removeprefix(each)
    if name in layers:
        return name
    for theirs, ours in _DIFFUSERS_NAMES:
        name = name.replace(theirs, ours)
    return name if name in layers else None


def _check_pair(layer: str, pair: LoraPair, layout: Layout, shape: tuple[int, int]) -> None:
    if pair.down not in layout:
        raise LoraError(f"{pair.up}: its other half {pair.down} is missing")
    up, down = layout[pair.up], layout[pair.down]
    if len(up) != 2 or len(down) != 2 or (up[0], down[1]) != shape or up[1] != down[0]:
        raise LoraError(
            f"{pair.up}: shapes {list(up)} and {list(down)} do not fit {layer}, which is {list(shape)}"
            ": is it for another model?"
        )
    if pair.alpha is not None and layout[pair.alpha] not in ((), (1,)):
        raise LoraError(f"{pair.alpha}: must be one number")
