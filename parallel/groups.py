"""The process groups of a split, made by xfuser and kept for the next job with the same split.

Owns joining xfuser's environment and one set of groups for each split that a job has asked for. xfuser sets its own
groups up once a process; a daemon chooses anew for each job, so the sets are made here, of xfuser's grid of ranks and
its group coordinators. Leaves out the default and the control group (`parallel.world`).
"""

import importlib.util
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d

from parallel import collectives
from parallel.split import ParallelDegrees

# Public in torch 2.15, and not in 2.11.
_set_timeout = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout


@dataclass(frozen=True, slots=True)
class Group:
    """Some ranks' process group, seen from one of them. `handle` is None for a group of one."""

    handle: Any
    rank: int
    size: int


SOLO = Group(None, 0, 1)


@dataclass(frozen=True, slots=True)
class SplitGroups:
    """The groups of one split. A rank's place in `sequence` is its place in the order of the tokens."""

    degrees: ParallelDegrees
    sequence: Group
    ulysses: Group
    ring: Group
    cfg: Group


class GroupTable:
    """Makes the groups of a split when a job first asks for it."""

    def __init__(self, *, world_size: int, local_rank: int, backend: str, timeout: timedelta) -> None:
        self._world_size = world_size
        self._timeout = timeout
        self._local_rank = local_rank
        self._backend = backend
        self._made: dict[ParallelDegrees, SplitGroups] = {}
        # By their ranks: each has a communicator, with buffers on the GPU, and two splits often have one in common.
        self._groups: dict[str, Group] = {}

    def groups_of(self, degrees: ParallelDegrees) -> SplitGroups:
        """Called by every rank, with the same degrees: making groups is collective."""
        assert degrees.world_size == self._world_size, "the whole world is the only gang there is"
        if degrees not in self._made:
            self._made[degrees] = self._make(degrees)
        return self._made[degrees]

    def _make(self, degrees: ParallelDegrees) -> SplitGroups:
        if self._world_size == 1:
            return SplitGroups(degrees, SOLO, SOLO, SOLO, SOLO)
        from xfuser.core.distributed.utils import RankGenerator

        # xfuser's grid has one axis for a sequence group and none for its two halves; the innermost one, tensor
        # parallelism's, is free. So Ulysses ranks are neighbours and the ring joins across them.
        grid = RankGenerator(
            tp=degrees.ulysses_degree,
            sp=degrees.ring_degree,
            pp=1,
            cfg=degrees.cfg_degree,
            dp=1,
            fs=1,
            order="tp-sp-pp-cfg-dp",
        )
        return SplitGroups(
            degrees=degrees,
            ulysses=self._group(grid.get_ranks("tp")),
            ring=self._group(grid.get_ranks("sp")),
            sequence=self._group(grid.get_ranks("tp-sp")),
            cfg=self._group(grid.get_ranks("cfg")),
        )

    def _group(self, group_ranks: list[list[int]]) -> Group:
        if len(group_ranks[0]) == 1:
            return SOLO
        key = str(group_ranks)
        if key not in self._groups:
            from xfuser.core.distributed.group_coordinator import GroupCoordinator

            made = GroupCoordinator(group_ranks, self._local_rank, self._backend)
            # xfuser leaves torch's ten minutes, which NCCL counts from when a transfer is queued: two steps may be.
            _set_timeout(self._timeout, made.device_group)
            self._groups[key] = Group(made.device_group, made.rank_in_group, made.world_size)
        return self._groups[key]


def join_xfuser(*, rank: int, world_size: int, local_rank: int, backend: str) -> None:
    """Called by every rank, once, after the default group exists."""
    _import_lean_xfuser()
    from xfuser.core.distributed import init_distributed_environment

    init_distributed_environment(rank=rank, world_size=world_size, local_rank=local_rank, backend=backend)


def _import_lean_xfuser() -> None:
    """Makes `xfuser` importable without what its `__init__` pulls in.

    That imports every diffusers pipeline xfuser knows, a fifth of a rank's start-up. The subpackages that are used
    here stand on their own.
    """
    if "xfuser" not in sys.modules:
        spec = importlib.util.find_spec("xfuser")
        assert spec is not None
        sys.modules["xfuser"] = importlib.util.module_from_spec(spec)
    import xfuser.envs

    if not torch.cuda.is_available():
        # xfuser decides by the build of torch, not by whether a GPU is there, and would bind a CUDA device.
        xfuser.envs._is_cuda = lambda: False
        xfuser.envs.get_device_version = lambda: None


def all_gather(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Called by every rank of the group: (n, ...) from each, as (size, n, ...) in the order of the ranks."""
    if group.handle is None:
        return tensor.unsqueeze(0)
    tensor = tensor.contiguous()
    gathered = tensor.new_empty((group.size * tensor.shape[0], *tensor.shape[1:]))
    collectives.all_gather_into_tensor(gathered, tensor, group=group.handle)
    return gathered.view(group.size, *tensor.shape)
