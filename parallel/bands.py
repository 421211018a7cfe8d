"""Convolutions over a frame that is cut into bands, one a rank, equal to those over the whole frame.

Owns which band each rank has, the exchange of the rows that a convolution reads beyond its band, and running
DiffSynth's Wan VAE modules (2.1 and 2.2) on a band: their own `forward`s are replaced for the time of a `banded`
block. Leaves out what is encoded or decoded (`parallel.vae`).

Only four kinds of module read beyond a pixel's own place. A causal convolution and the one after an upsampling read
one row on either side; a downsampling reads one row after the band; the one attention block reads the whole
low-resolution frame. Everything else (norms, activations, shortcuts, the feature caches along time) is local, as
long as bands are cut at whole latent rows: then every band has an even number of rows at every level.
"""

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffsynth.models.wan_video_vae import AttentionBlock, CausalConv3d, Upsample
from torch import nn

from parallel.collectives import isend_irecv

ROWS, COLUMNS = -2, -1


@dataclass(frozen=True, slots=True)
class Bands:
    """Consecutive bands of a latent frame along one of its axes, the first on rank 0.

    `dim` is ROWS or COLUMNS, `sizes` the bands' sizes in latent rows or columns; a rank past the last band has none.
    """

    dim: int
    sizes: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        """This rank's own, 0 for a rank without a band."""
        return self.sizes[self.rank] if self.rank < len(self.sizes) else 0

    def start(self, rank: int) -> int:
        return sum(self.sizes[:rank])

    def cut(self, frame: torch.Tensor, rank: int, *, scale: int = 1) -> torch.Tensor:
        """A rank's band of a whole frame, which has `scale` pixels for a latent one."""
        return frame.narrow(self.dim, self.start(rank) * scale, self.sizes[rank] * scale)


def cut_bands(height: int, width: int, *, world_size: int, rank: int) -> Bands:
    """Cuts a latent frame of `height` x `width` as evenly as can be, along the axis that gives the smaller share.

    A tie goes to the longer axis, where the rows exchanged are shorter. Where there are fewer rows and columns than
    ranks, the last ranks have no band.
    """
    by_share = {}
    for dim, size, other in ((ROWS, height, width), (COLUMNS, width, height)):
        count = min(world_size, size)
        by_share[-(-size // count) / size, other] = (dim, size, count)
    dim, size, count = by_share[min(by_share)]
    sizes = tuple(size // count + (index < size % count) for index in range(count))
    return Bands(dim=dim, sizes=sizes, rank=rank)


@contextlib.contextmanager
def banded(model: nn.Module, bands: Bands) -> Iterator[None]:
    """Within the block `model`, DiffSynth's `VideoVAE_` or a part of it, works on this rank's band."""
    replaced: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        forward = _forward_on(module, bands)
        if forward is not None:
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = types.MethodType(forward, module)
    try:
        yield
    finally:
        for module, own in replaced:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def exchange(sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
    """Sends contiguous tensors to ranks and fills others from ranks, over the default group.

    Called by those ranks only that have something to send or receive. With NCCL the group must have been used by all
    ranks before.
    """
    operations = [dist.P2POp(dist.isend, tensor, rank) for tensor, rank in sends]
    operations += [dist.P2POp(dist.irecv, tensor, rank) for tensor, rank in receives]
    for work in isend_irecv(operations):
        work.wait()


def _forward_on(module: nn.Module, bands: Bands) -> Callable[..., torch.Tensor] | None:
    """What replaces a module's `forward`, None for one that works on any band as it is."""
    match module:
        case CausalConv3d():
            return _causal_conv(bands)
        case Upsample():
            return _upsample
    if len(bands.sizes) == 1:
        return None
    match module:
        case nn.Conv2d() if any(module.padding):
            return _conv_2d(bands)
        case nn.ZeroPad2d():
            return _zero_pad(bands)
        case AttentionBlock():
            return _attention(bands)
    return None


def _padded(
    x: torch.Tensor, padding: Sequence[int], bands: Bands, *, earlier: torch.Tensor | None = None
) -> torch.Tensor:
    """`x` behind `earlier` along time, padded as by `F.pad`; along the bands' axis with the neighbours' rows.

    One allocation instead of the three of concatenating, padding and putting the rows around.
    """
    left, right, top, bottom = padding[:4]
    shape = list(x.shape)
    shape[-1] += left + right
    shape[-2] += top + bottom
    before, after = (top, bottom) if bands.dim == ROWS else (left, right)
    if x.dim() == 5:
        front = padding[4]
        frames = 0 if earlier is None else earlier.shape[2]
        shape[2] += front + frames
        out = x.new_zeros(shape)
        filled = out.narrow(2, front, shape[2] - front)
        inner = filled.narrow(-2, top, x.shape[-2]).narrow(-1, left, x.shape[-1])
        if earlier is not None:
            inner.narrow(2, 0, frames).copy_(earlier)
        inner.narrow(2, frames, x.shape[2]).copy_(x)
    else:
        filled = out = x.new_zeros(shape)
        inner = out.narrow(-2, top, x.shape[-2]).narrow(-1, left, x.shape[-1])
        inner.copy_(x)
    across = filled.narrow(-1, left, x.shape[-1]) if bands.dim == ROWS else filled.narrow(-2, top, x.shape[-2])
    _fill_halo(across, inner, bands, before=before, after=after)
    return out


def _fill_halo(across: torch.Tensor, inner: torch.Tensor, bands: Bands, *, before: int, after: int) -> None:
    """Fills the first `before` and the last `after` rows of `across` from the neighbours' `inner` rows."""
    dim, size = bands.dim, inner.shape[bands.dim]
    sends, receives, places = [], [], []
    if bands.rank > 0:
        if after:
            sends.append((inner.narrow(dim, 0, after).contiguous(), bands.rank - 1))
        if before:
            place = across.narrow(dim, 0, before)
            places.append(place)
            receives.append((torch.empty_like(place, memory_format=torch.contiguous_format), bands.rank - 1))
    if bands.rank < len(bands.sizes) - 1:
        if before:
            sends.append((inner.narrow(dim, size - before, before).contiguous(), bands.rank + 1))
        if after:
            place = across.narrow(dim, before + size, after)
            places.append(place)
            receives.append((torch.empty_like(place, memory_format=torch.contiguous_format), bands.rank + 1))
    exchange(sends, receives)
    for place, (received, _) in zip(places, receives, strict=True):
        place.copy_(received)


def _causal_conv(bands: Bands) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        padding = list(self._padding)
        if cache_x is not None and padding[4] > 0:
            padding[4] -= cache_x.shape[2]
        else:
            cache_x = None
        if cache_x is not None or any(padding):
            x = _padded(x, padding, bands, earlier=cache_x)
        return nn.Conv3d.forward(self, x)

    return forward


def _conv_2d(bands: Bands) -> Callable[..., torch.Tensor]:
    def forward(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        rows, columns = int(self.padding[0]), int(self.padding[1])
        padded = _padded(x, (columns, columns, rows, rows), bands)
        return F.conv2d(padded, self.weight, self.bias, self.stride)

    return forward


def _zero_pad(bands: Bands) -> Callable[..., torch.Tensor]:
    def forward(self: nn.ZeroPad2d, x: torch.Tensor) -> torch.Tensor:
        return _padded(x, self.padding, bands)

    return forward


def _upsample(self: Any, x: torch.Tensor) -> torch.Tensor:
    # DiffSynth goes through float32, which nearest-exact no longer needs: the same bits, a third of the memory.
    return nn.Upsample.forward(self, x)


def _attention(bands: Bands) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        b, c, t, h, w = x.shape
        flat = x.transpose(1, 2).reshape(b * t, c, h, w)
        query, key_value = self.to_qkv(self.norm(flat)).split([c, 2 * c], dim=1)
        whole = _gather_everywhere(key_value.contiguous(), bands)
        q = query.reshape(b * t, 1, c, -1).transpose(2, 3).contiguous()
        k, v = whole.reshape(b * t, 1, 2 * c, -1).transpose(2, 3).contiguous().chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended.squeeze(1).transpose(1, 2).reshape(b * t, c, h, w)
        projected: torch.Tensor = self.proj(attended)
        return projected.reshape(b, t, c, h, w).transpose(1, 2) + x

    return forward


def _gather_everywhere(part: torch.Tensor, bands: Bands) -> torch.Tensor:
    """Called by every rank with a band. The whole frame, from every band's `part` at latent resolution."""
    parts = []
    for rank, size in enumerate(bands.sizes):
        shape = list(part.shape)
        shape[bands.dim] = size
        parts.append(part if rank == bands.rank else part.new_empty(shape))
    others = [rank for rank in range(len(bands.sizes)) if rank != bands.rank]
    exchange([(part, rank) for rank in others], [(parts[rank], rank) for rank in others])
    return torch.cat(parts, dim=bands.dim) if others else part
