"""What travels between the ranks' devices, counted.

A rank that fails leaves transfers that it began, or that others began and it did not. On a GPU they wait in streams,
and the next job's would meet them. So every rank counts what it begins, and a group outlives a failure only where all
counts are the same (`daemon.attempt`). Leaves out the control group, whose messages are awaited on the spot.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist


class _Place:
    """Where this process is in the order of transfers, which is the same on every rank: one for each that it is about
    to begin, and one more once it has. An error in between is at a place of its own."""

    def __init__(self) -> None:
        self.number = 0


_PLACE = _Place()


def place() -> int:
    """Where this rank is now; to be compared with others' only."""
    return _PLACE.number


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    _PLACE.number += 1
    yield
    _PLACE.number += 1


@contextlib.contextmanager
def counted_as_one() -> Iterator[None]:
    """Around work in which not every rank has a part: afterwards all are at one place again. An error leaves each rank
    where it was."""
    before = _PLACE.number
    yield
    _PLACE.number = before + 1


def all_gather_into_tensor(
    gathered: torch.Tensor, own: torch.Tensor, *, group: Any = None, async_op: bool = False
) -> Any:
    with _counted():
        return dist.all_gather_into_tensor(gathered, own, group=group, async_op=async_op)


def all_to_all_single(received: torch.Tensor, sent: torch.Tensor, *, group: Any) -> None:
    with _counted():
        dist.all_to_all_single(received, sent, group=group)


def all_reduce_min(tensor: torch.Tensor) -> None:
    """Over the default group, in place."""
    with _counted():
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)


def broadcast(tensor: torch.Tensor, *, source: int) -> None:
    """Over the default group, in place."""
    with _counted():
        dist.broadcast(tensor, src=source)


def isend_irecv(operations: Sequence[dist.P2POp]) -> list[dist.Work]:
    """Begins all of them together. Without any, counts nothing."""
    if not operations:
        return []
    with _counted():
        begun: list[dist.Work] = dist.batch_isend_irecv(list(operations))
    return begun
