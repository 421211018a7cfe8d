"""What is watched while a job is generated: devices and dtypes, NaN, and ranks that drift apart.

Each check fails the job, not the daemon, except for a divergence: then the ranks no longer agree, and the group is
started afresh. Leaves out what an error becomes (`parallel.engine`, `daemon.attempt`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from parallel.outcome import DivergedError, InconsistentError, NonFiniteError
from parallel.world import World


def check_consistency(
    modules: list[torch.nn.Module],
    conditions: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
) -> None:
    """Raises InconsistentError that names rank, module, device and dtype, if anything is not where it must be.

    Offloaded modules are moved when they are called, so weights on the CPU are taken as they are; the meta device and
    another GPU are not. Buffers may have a dtype of their own (tables and the like).
    """
    faults = [
        f"{type(module).__name__}.{name} is on {tensor.device}"
        for module in modules
        for name, tensor in _tensors(module)
        if tensor.device != device and tensor.device.type != "cpu"
    ]
    faults += [
        f"{type(module).__name__}.{name} is {parameter.dtype}"
        for module in modules
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and parameter.dtype != dtype
    ]
    for name, value in conditions.items():
        if not isinstance(value, Tensor):
            continue
        if value.device != device:
            faults.append(f"the condition {name} is on {value.device}")
        elif value.is_floating_point() and value.dtype != dtype:
            faults.append(f"the condition {name} is {value.dtype}")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InconsistentError(f"rank {rank}, which computes on {device} in {dtype}: {'; '.join(faults[:3])}{more}")


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


class _Reading:
    """A number on its way from the device, read without waiting for what was queued after it."""

    def __init__(self, value: Tensor) -> None:
        self._host, self._event = value, None
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)


class FiniteCheck:
    """Looks for NaN and infinity without waiting for the device: what it saw is read a step later."""

    def __init__(self) -> None:
        self._bad: list[_Reading] = []

    def look(self, latents: Tensor) -> None:
        self._bad.append(_Reading(~torch.isfinite(latents).all()))

    def raise_if_known(self) -> None:
        """Raises NonFiniteError for what is known by now. Equal latents on every rank make it equal on every rank."""
        # All but the last look are waited for: `denoise` has already waited for the step before it. A look that is
        # merely probably done must not be read, or the ranks would stop at different steps.
        while len(self._bad) > 1:
            self._read()

    def settle(self) -> None:
        while self._bad:
            self._read()

    def _read(self) -> None:
        if self._bad.pop(0).read():
            raise NonFiniteError("the latents hold NaN or infinity")


class DivergenceCheck:
    """Compares a checksum of the latents' bits over all ranks, every `interval` steps and at the last one.

    The checksum is read a step later, so that nothing waits for the device; 0 turns the check off.
    """

    def __init__(self, world: World, *, interval: int) -> None:
        self._world = world
        self._interval = interval if world.world_size > 1 else 0
        self._pending: tuple[int, _Reading] | None = None

    def look(self, latents: Tensor, *, step: int, last: bool) -> None:
        """Called by every rank, at the same step."""
        self.settle()
        if self._interval and (last or step % self._interval == 0):
            bits = latents.contiguous().view(torch.uint8).view(-1)
            # Position counts, or two elements could change places unseen; wraps around at 2**63.
            weights = torch.arange(1, bits.numel() + 1, device=bits.device)
            self._pending = (step, _Reading((bits.long() * weights).sum()))

    def settle(self) -> None:
        """Called by every rank. Raises DivergedError on every rank when the checksums differ."""
        if self._pending is None:
            return
        (step, checksum), self._pending = self._pending, None
        values = self._world.gather_numbers(checksum.read())
        if len(set(values)) > 1:
            odd = [rank for rank, value in enumerate(values) if value != values[0]]
            raise DivergedError(f"after step {step} the latents of rank(s) {odd} are not those of rank 0")
