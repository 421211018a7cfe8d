"""Wan's VAE shared out over the ranks, encoding and decoding, whole or in tiles.

Whole: every rank has a band of the frame (`parallel.bands`), and the result is that of the undivided VAE up to
rounding. Tiled: DiffSynth's overlapping tiles, each decoded by one rank and blended on rank 0 in DiffSynth's order,
so that the result is DiffSynth's, bit for bit. Its default tiles compute three times the pixels of the whole frame
and blend what a seam would show; whole is better and cheaper wherever a rank has the memory.

Leaves out when it is done (`parallel.conditions`, `parallel.decode`) and what becomes of frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffsynth.models.wan_video_vae import VideoVAE38_, WanVideoVAE, unpatchify

from parallel.bands import Bands, banded, cut_bands, exchange
from parallel.collectives import counted_as_one
from parallel.world import World


@dataclass(frozen=True, slots=True)
class Tiles:
    """DiffSynth's `tile_size` and `tile_stride`: rows and columns of the latent frame."""

    size: tuple[int, int]
    stride: tuple[int, int]

    def scaled(self, factor: int) -> "Tiles":
        return Tiles(
            size=(self.size[0] * factor, self.size[1] * factor),
            stride=(self.stride[0] * factor, self.stride[1] * factor),
        )

    def tasks(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Each tile as (top, bottom, left, right), in DiffSynth's order; bottom and right may lie outside."""
        (size_h, size_w), (stride_h, stride_w) = self.size, self.stride
        return [
            (top, top + size_h, left, left + size_w)
            for top in range(0, height, stride_h)
            if not (top - stride_h >= 0 and top - stride_h + size_h >= height)
            for left in range(0, width, stride_w)
            if not (left - stride_w >= 0 and left - stride_w + size_w >= width)
        ]


def decode_bands(vae: WanVideoVAE, latents: torch.Tensor, bands: Bands) -> Iterator[torch.Tensor]:
    """Called by every rank, with the whole latents (1, channels, frames, height, width).

    Yields this rank's band of the video as it gets ready, (1, 3, frames, height, width) of floats, not clamped: one
    frame first, then four at a time. A rank without a band yields nothing.
    """
    if bands.size:
        with banded(vae.model, bands):
            yield from _decode(vae, bands.cut(latents, bands.rank))


def decode_tiles(vae: WanVideoVAE, latents: torch.Tensor, tiles: Tiles, world: World) -> torch.Tensor | None:
    """Called by every rank, with the whole latents. The video on rank 0, (1, 3, frames, height, width), not clamped."""
    factor = vae.upsampling_factor
    height, width = latents.shape[-2:]
    frames = latents.shape[2] * 4 - 3
    blend = _Blend(vae, tiles, (3, frames, height, width), factor, like=latents) if world.rank == 0 else None
    undivided = Bands(dim=-2, sizes=(height,), rank=0)
    tasks = tiles.tasks(height, width)
    for begun in range(0, len(tasks), world.world_size):
        now = tasks[begun : begun + world.world_size]
        made = None
        if world.rank < len(now):
            top, bottom, left, right = now[world.rank]
            with banded(vae.model, undivided):
                made = torch.cat(list(_decode(vae, latents[..., top:bottom, left:right])), dim=2)
        shapes = [
            (1, 3, frames, (min(bottom, height) - top) * factor, (min(right, width) - left) * factor)
            for top, bottom, left, right in now
        ]
        for task, tile in zip(now, _collect(made, shapes, latents.dtype, world), strict=False):
            assert blend is not None
            blend.add(task, tile)
    return blend.result() if blend is not None else None


@counted_as_one()
def encode_shared(
    vae: WanVideoVAE,
    video: torch.Tensor | None,
    shape: Sequence[int],
    world: World,
    *,
    dtype: torch.dtype,
    tiles: Tiles | None,
) -> torch.Tensor | None:
    """Called by every rank; `video`, (1, 3, frames, height, width) on the device, is given on rank 0 alone.

    Returns the latents on rank 0, (1, channels, frames, height, width), normalised as DiffSynth's `encode`. `tiles`
    are in pixels here. A frame that is no whole number of latent ones is encoded by rank 0 alone.
    """
    if tiles is not None:
        return _encode_tiles(vae, video, shape, tiles, world, dtype=dtype)
    factor = vae.upsampling_factor
    height, width = shape[-2:]
    if height % factor or width % factor:
        bands = Bands(dim=-2, sizes=(height,), rank=world.rank)
    else:
        bands = cut_bands(height // factor, width // factor, world_size=world.world_size, rank=world.rank)
    band = _scatter(video, shape, bands, scale=factor, dtype=dtype, world=world)
    latents = None
    if band is not None:
        with banded(vae.model, bands):
            latents = _encode(vae, band)
    return gather_bands(latents, bands)


def gather_bands(part: torch.Tensor | None, bands: Bands) -> torch.Tensor | None:
    """Called by every rank, a rank without a band included. The whole frame on rank 0, from every rank's `part`."""
    if part is None or len(bands.sizes) == 1:
        return part
    if bands.rank > 0:
        exchange([(part.contiguous(), 0)], [])
        return None
    scale = part.shape[bands.dim] // bands.size
    parts = [part]
    for size in bands.sizes[1:]:
        shape = list(part.shape)
        shape[bands.dim] = size * scale
        parts.append(part.new_empty(shape))
    exchange([], [(other, rank) for rank, other in enumerate(parts) if rank > 0])
    return torch.cat(parts, dim=bands.dim)


def _decode(vae: WanVideoVAE, z: torch.Tensor) -> Iterator[torch.Tensor]:
    """DiffSynth's `VideoVAE_.decode`, piece by piece instead of one growing tensor; the caches are dropped after."""
    model = vae.model
    mean, inverse_deviation = (part.to(z).view(1, model.z_dim, 1, 1, 1) for part in vae.scale)
    is_38 = isinstance(model, VideoVAE38_)
    model.clear_cache()
    try:
        x = model.conv2(z / inverse_deviation + mean)
        for index in range(z.shape[2]):
            model._conv_idx = [0]
            first = {"first_chunk": index == 0} if is_38 else {}
            made, model._feat_map, model._conv_idx = model.decoder(
                x[:, :, index : index + 1], feat_cache=model._feat_map, feat_idx=model._conv_idx, **first
            )
            yield unpatchify(made, patch_size=2) if is_38 else made
    finally:
        model.clear_cache()


def _encode(vae: WanVideoVAE, video: torch.Tensor) -> torch.Tensor:
    try:
        latents: torch.Tensor = vae.model.encode(video, vae.scale)
    finally:
        vae.model.clear_cache()  # Wan 2.1's keeps them, gigabytes at 720p
    return latents


def _encode_tiles(
    vae: WanVideoVAE,
    video: torch.Tensor | None,
    shape: Sequence[int],
    tiles: Tiles,
    world: World,
    *,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    factor = vae.upsampling_factor
    _, channels, frames, height, width = shape
    latent_frames = (frames + 3) // 4
    blend = None
    if world.rank == 0:
        assert video is not None
        blend = _Blend(vae, tiles, (vae.z_dim, latent_frames, height, width), 1 / factor, like=video)
    undivided = Bands(dim=-2, sizes=(height,), rank=0)
    tasks = tiles.tasks(height, width)
    for begun in range(0, len(tasks), world.world_size):
        now = tasks[begun : begun + world.world_size]
        sizes = [(min(bottom, height) - top, min(right, width) - left) for top, bottom, left, right in now]
        made = None
        if world.rank == 0:
            assert video is not None
            cut = [video[..., top:bottom, left:right] for top, bottom, left, right in now]
            exchange([(tile.contiguous(), rank) for rank, tile in enumerate(cut) if rank > 0], [])
            mine = cut[0]
        elif world.rank < len(now):
            mine = torch.empty((1, channels, frames, *sizes[world.rank]), dtype=dtype, device=world.device)
            exchange([], [(mine, 0)])
        if world.rank < len(now):
            with banded(vae.model, undivided):
                made = _encode(vae, mine)
        shapes = [(1, vae.z_dim, latent_frames, rows // factor, columns // factor) for rows, columns in sizes]
        for task, tile in zip(now, _collect(made, shapes, dtype, world), strict=False):
            assert blend is not None
            blend.add(task, tile)
    return blend.result() if blend is not None else None


def _scatter(
    frame: torch.Tensor | None,
    shape: Sequence[int],
    bands: Bands,
    *,
    scale: int,
    dtype: torch.dtype,
    world: World,
) -> torch.Tensor | None:
    """Called by every rank. This rank's band of rank 0's frame, None on a rank without one."""
    if len(bands.sizes) == 1:
        return frame
    if world.rank == 0:
        assert frame is not None
        others = range(1, len(bands.sizes))
        exchange([(bands.cut(frame, rank, scale=scale).contiguous(), rank) for rank in others], [])
        return bands.cut(frame, 0, scale=scale)
    if not bands.size:
        return None
    of_band = list(shape)
    of_band[bands.dim] = bands.size * scale
    band = torch.empty(of_band, dtype=dtype, device=world.device)
    exchange([], [(band, 0)])
    return band


def _collect(
    made: torch.Tensor | None, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, world: World
) -> list[torch.Tensor]:
    """Called by every rank. On rank 0 the tiles of the first `len(shapes)` ranks, elsewhere nothing."""
    if world.rank > 0:
        if made is not None:
            exchange([(made.contiguous(), 0)], [])
        return []
    assert made is not None
    others = [torch.empty(shape, dtype=dtype, device=world.device) for shape in shapes[1:]]
    exchange([], [(tile, rank) for rank, tile in enumerate(others, start=1)])
    return [made, *others]


class _Blend:
    """DiffSynth's weighted sum of overlapping tiles, in the dtype of what is decoded or encoded."""

    def __init__(
        self, vae: WanVideoVAE, tiles: Tiles, shape: tuple[int, int, int, int], factor: float, *, like: torch.Tensor
    ) -> None:
        channels, frames, self._height, self._width = shape
        height, width = int(self._height * factor), int(self._width * factor)
        self._vae, self._factor = vae, factor
        self._border = tuple(
            int((size - stride) * factor) for size, stride in zip(tiles.size, tiles.stride, strict=True)
        )
        self._values = like.new_zeros((1, channels, frames, height, width))
        self._weight = like.new_zeros((1, 1, frames, height, width))

    def add(self, task: tuple[int, int, int, int], tile: torch.Tensor) -> None:
        top, bottom, left, right = task
        inside = (top == 0, bottom >= self._height, left == 0, right >= self._width)
        mask = self._vae.build_mask(tile, is_bound=inside, border_width=self._border).to(self._values)
        place = (
            ...,
            slice(int(top * self._factor), int(top * self._factor) + tile.shape[-2]),
            slice(int(left * self._factor), int(left * self._factor) + tile.shape[-1]),
        )
        self._values[place] += tile * mask
        self._weight[place] += mask

    def result(self) -> torch.Tensor:
        return self._values / self._weight
