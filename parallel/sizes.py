"""The sizes of a model's parts, as the headers of its files give them. Pure Python.

Leaves out what follows from them (`memory.py`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from parallel.layouts import Layout, Shape, read_layout
from parallel.profile import ModelFiles, ModelProfile

_BLOCK = re.compile(r"^(?:model\.)?(?:vace_)?blocks\.(\d+)\.")
_ENCODERS = ("text_encoder", "image_encoder", "audio_encoder")


@dataclass(frozen=True)
class PartSizes:
    """One model of the pipeline, by DiffSynth's name.

    `blocks`: the shapes of each block's tensors, of a DiT, of VACE and of the text encoder. `matrices`: the elements of
    a DiT's linear layers' weights, which a LoRA may change.
    """

    name: str
    elements: int
    blocks: tuple[tuple[Shape, ...], ...] = ()
    matrices: int = 0

    @property
    def is_encoder(self) -> bool:
        return self.name in _ENCODERS

    @property
    def is_sharded(self) -> bool:
        """Whether its blocks are spread over the ranks under fsdp."""
        return self.is_dit or self.name in ("vace", "vace2")

    @property
    def is_dit(self) -> bool:
        return self.name in ("dit", "dit2")

    @cached_property
    def outside_blocks(self) -> int:
        return self.elements - sum(math.prod(tensor) for block in self.blocks for tensor in block)

    @cached_property
    def largest_block(self) -> int:
        return max((sum(math.prod(tensor) for tensor in block) for block in self.blocks), default=0)

    @cached_property
    def linear_elements(self) -> int:
        """Of the linear layers in the blocks, biases included."""
        linear = 0
        for block in self.blocks:
            matrices = [tensor for tensor in block if len(tensor) == 2]
            linear += sum(math.prod(tensor) + tensor[0] for tensor in matrices)
        return linear


@dataclass(frozen=True, slots=True)
class DitSizes:
    dim: int
    ffn_dim: int
    num_heads: int
    in_channels: int
    text_dim: int
    takes_image_tokens: bool
    vace_layers: int
    camera_channels: int
    """Of the camera's input for each pixel; 0: takes none."""


@dataclass(frozen=True, slots=True)
class VaeSizes:
    """`decode_planes`, `encode_planes`: values alive at the fullest point, for each pixel of the frame.

    Measured on DiffSynth's classes at several widths: they are linear in the width, because both hold a fixed number
    of frames of each level's features (four in work, two in the caches) whatever the video's length.
    """

    channels: int
    factor: int
    decode_planes: float
    encode_planes: float


@dataclass(frozen=True, slots=True)
class TextSizes:
    num_heads: int
    ffn_dim: int


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """All that the memory of a job depends on, of one model."""

    parts: tuple[PartSizes, ...]
    dit: DitSizes
    vae: VaeSizes
    text: TextSizes


def read_sizes(files: ModelFiles) -> ModelSizes:
    """The sizes of a checked folder. Raises LayoutError or OSError when a file has changed since."""
    layouts: dict[str, Layout] = {}
    for role, paths in files.paths.items():
        layouts[role] = {name: shape for path in paths for name, shape in read_layout(path).items()}
    return sizes_of(files.profile, layouts)


def sizes_of(profile: ModelProfile, layouts: Mapping[str, Layout]) -> ModelSizes:
    """The sizes of a model whose files have these layouts, by role."""
    parts: list[PartSizes] = []
    for role, layout in layouts.items():
        if role.startswith("dit"):
            parts += _dit_parts("dit2" if role == "dit_low_noise" else "dit", layout)
        else:
            used = [shape for name, shape in layout.items() if not name.startswith("textual.")]
            blocks = _blocks(layout) if role == "text_encoder" else ()
            parts.append(PartSizes(role, sum(map(math.prod, used)), blocks))
    dit = next(layout for role, layout in layouts.items() if role.startswith("dit"))
    return ModelSizes(
        parts=tuple(parts),
        dit=_dit_sizes(profile, dit),
        vae=_vae_sizes(layouts["vae"]),
        text=_text_sizes(layouts["text_encoder"]),
    )


def _dit_parts(name: str, layout: Layout) -> list[PartSizes]:
    vace = {tensor: shape for tensor, shape in layout.items() if tensor.startswith("vace")}
    plain = {tensor: shape for tensor, shape in layout.items() if tensor not in vace}
    matrices = sum(math.prod(shape) for shape in plain.values() if len(shape) == 2)
    found = [PartSizes(name, sum(map(math.prod, plain.values())), _blocks(plain), matrices)]
    if vace:
        found.append(PartSizes(name.replace("dit", "vace"), sum(map(math.prod, vace.values())), _blocks(vace)))
    return found


def _blocks(layout: Layout) -> tuple[tuple[Shape, ...], ...]:
    """The shapes of each block's tensors."""
    blocks: dict[int, list[Shape]] = {}
    for tensor, shape in layout.items():
        if (block := _BLOCK.match(tensor)) is not None:
            blocks.setdefault(int(block[1]), []).append(shape)
    return tuple(tuple(blocks[index]) for index in sorted(blocks))


def _dit_sizes(profile: ModelProfile, layout: Layout) -> DitSizes:
    plain = {name.removeprefix("model."): shape for name, shape in layout.items()}
    dim, in_channels = plain["patch_embedding.weight"][:2]
    feed_forward = _first(plain, "blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight")
    text = _first(plain, "text_embedding.0.weight", "condition_embedder.text_embedder.linear_1.weight")
    return DitSizes(
        dim=dim,
        ffn_dim=feed_forward[0],
        num_heads=profile.num_heads,
        in_channels=in_channels,
        text_dim=text[1],
        takes_image_tokens=any("k_img" in name or "add_k_proj" in name for name in plain),
        vace_layers=len({name.split(".")[1] for name in plain if name.startswith("vace_blocks.")}),
        # Of a convolution over squares of 8 x 8 pixels, made into channels.
        camera_channels=plain.get("control_adapter.conv.weight", (0, 0))[1] // 64,
    )


def _vae_sizes(layout: Layout) -> VaeSizes:
    layout = {name.removeprefix("model."): shape for name, shape in layout.items()}
    decoder, channels = layout["decoder.conv1.weight"][:2]
    encoder = layout["encoder.conv1.weight"][0]
    if channels == 48:  # Wan 2.2's, which works on patches of 2 x 2 pixels
        return VaeSizes(48, 16, decode_planes=19.1 * decoder / 4 + 25, encode_planes=10.7 * encoder + 7)
    return VaeSizes(channels, 8, decode_planes=45.0 * decoder / 4 + 12, encode_planes=34.9 * encoder + 7)


def _text_sizes(layout: Layout) -> TextSizes:
    # (buckets, heads): the relative position bias, in each block or shared by all.
    bias = next(shape for name, shape in layout.items() if name.endswith("pos_embedding.embedding.weight"))
    return TextSizes(num_heads=bias[1], ffn_dim=layout["blocks.0.ffn.fc1.weight"][0])


def _first(layout: Layout, *names: str) -> Shape:
    return next(layout[name] for name in names if name in layout)
