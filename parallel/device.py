"""Which device a rank works on, and whether it may.

Leaves out binding it (`parallel.world`) and what torch finds on a box (`parallel.inventory`).
"""

import os
from pathlib import Path

import structlog
import torch

log = structlog.get_logger("world")


class CudaForkedError(RuntimeError):
    """Raised in a process that was forked from one that had used CUDA: it cannot."""


def pick_device(kind: str, local_rank: int) -> torch.device:
    """The device of a local rank; `kind` is auto, cpu or cuda.

    Raises ValueError when there is no such GPU, CudaForkedError when this process may not use it.
    """
    if kind == "auto" and not torch.cuda.is_available():
        log.warning("no_gpu", device="cpu", reason='on a box with GPUs set device = "cuda", which does not start then')
        kind = "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    # Counted first: a process in which CUDA found no GPU leaves the same mark on its forks as one that used some.
    found = torch.cuda.device_count()
    if torch.cuda._is_in_bad_fork() and (found > local_rank or _only_cuda_can_count()):
        raise CudaForkedError("this rank was forked from a process that had used CUDA, which does not survive it")
    if found <= local_rank or not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "without CUDA_VISIBLE_DEVICES" if visible is None else f"with CUDA_VISIBLE_DEVICES={visible!r}"
        raise ValueError(
            f"no GPU for local rank {local_rank}: {found} found, {seen}; see whether the NVIDIA driver works"
            " (`reeld doctor --torch`), lower nproc_per_node or set device = cpu"
        )
    return torch.device("cuda", local_rank)


def _only_cuda_can_count() -> bool:
    """Whether a driver is there that NVML, which a fork does not disturb, does not answer for: in some containers."""
    return torch.cuda._device_count_nvml() < 0 and Path("/dev/nvidiactl").exists()
