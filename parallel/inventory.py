"""What torch finds on this machine: GPUs, NCCL, attention kernels. `python -m parallel.inventory` prints it as JSON.

A program of its own, because importing torch takes seconds and using a GPU holds some of its memory. Leaves out what
is good or bad about it (`ops.doctor_machine`).
"""

import json
from typing import Any

import torch
import torch.distributed as dist

from parallel.kernels import try_kernels

# Of the Wan models.
_HEAD_DIM = 128


def inventory() -> dict[str, Any]:
    """`{torch, cuda, cudnn, nccl, gpus, kernels}`.

    Of each GPU name, capability, memory and the ones it reaches; of each kernel why it does not run in bfloat16.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", 0) if count else torch.device("cpu")
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if count else None,
        "nccl": _nccl(),
        "gpus": [_gpu(index, count) for index in range(count)],
        "kernels": {kernel.name: refusal for kernel, refusal in try_kernels(device, torch.bfloat16, _HEAD_DIM)},
    }


def _nccl() -> str | None:
    if not dist.is_nccl_available():
        return None
    version = torch.cuda.nccl.version()
    return ".".join(str(part) for part in version) if isinstance(version, tuple) else str(version)


def _gpu(index: int, count: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    others = [other for other in range(count) if other != index]
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "reaches": [other for other in others if torch.cuda.can_device_access_peer(index, other)],
    }


if __name__ == "__main__":
    print(json.dumps(inventory()))
