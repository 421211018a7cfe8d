"""Rotary position embedding in three dimensions, as tables that are made once for a shape.

Owns the cosines and sines of one rank's slice of the tokens and their application in float32. DiffSynth builds the
whole sequence's table on the CPU in complex128 at every forward and rotates in float64; the angles here are its own
(`WanModel.freqs`, in float64), rounded once to float32. Source of the embedding: https://arxiv.org/abs/2104.09864.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffsynth.models.wan_video_dit import WanModel

_TABLES_KEPT = 8  # a table of 480x832x81 on one rank takes 17 MB


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """How many tokens there are along time, height and width. Tokens are numbered in this order, width fastest."""

    frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos, sin: (tokens, 1, 1, head_dim / 2), float32, on the device; for tokens first in a tensor."""

    cos: torch.Tensor
    sin: torch.Tensor

    @staticmethod
    def of(turns: torch.Tensor, *, padded: int, device: torch.device) -> "RopeTable":
        """From (tokens, head_dim / 2) complex numbers of length one; rows up to `padded` rotate by nothing."""
        padding = torch.ones(padded - turns.shape[0], turns.shape[1], dtype=turns.dtype)
        turns = torch.cat((turns, padding))[:, None, None, :]
        return RopeTable(cos=turns.real.float().to(device), sin=turns.imag.float().to(device))


class RopeTables:
    """The tables of the last few shapes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: OrderedDict[tuple[object, ...], RopeTable] = OrderedDict()

    def table(self, dit: WanModel, grid: TokenGrid, *, begin: int, length: int, padded: int) -> RopeTable:
        """For the tokens [begin, begin + length) of `grid`; rows up to `padded` rotate by nothing."""
        head_dim = 2 * sum(part.shape[1] for part in dit.freqs)
        key = (head_dim, grid, begin, length, padded)
        return self.kept(key, lambda: _table(dit, grid, begin, length, padded, self._device))

    def kept(self, key: tuple[object, ...], make: Callable[[], RopeTable]) -> RopeTable:
        """The table under `key`, or what `make` makes; the least recently used one goes."""
        if key not in self._tables:
            self._tables[key] = make()
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]


def _table(dit: WanModel, grid: TokenGrid, begin: int, length: int, padded: int, device: torch.device) -> RopeTable:
    number = torch.arange(begin, begin + length)
    along_time, rest = number // (grid.height * grid.width), number % (grid.height * grid.width)
    along_height, along_width = rest // grid.width, rest % grid.width
    parts = zip(dit.freqs, (along_time, along_height, along_width), strict=True)
    turns = torch.cat([freqs.cpu()[positions] for freqs, positions in parts], dim=1)
    return RopeTable.of(turns, padded=padded, device=device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair of neighbouring channels of x, (tokens, batch, heads, head_dim), by its token's angle.

    Computes in float32 and returns x's dtype.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
