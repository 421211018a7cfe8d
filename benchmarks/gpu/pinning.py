"""How long it takes to have page-locked host memory for a text encoder, in several ways.

`python -m benchmarks.gpu.pinning`. Under `fsdp` and `encoder_offload` rank 0 keeps the encoder there, and waits for
that memory before it reads. Prints JSON: seconds, and by how much the process grew, for UMT5-XXL's tensors in bfloat16.
Each way has a process of its own.
"""

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from parallel.parts import layout_of
from parallel.profile import load_profile


def main() -> None:
    context = multiprocessing.get_context("spawn")
    for name in [sys.argv[1]] if len(sys.argv) > 1 else _WAYS:
        process = context.Process(target=_measure, args=(name,))
        process.start()
        process.join()


def _measure(name: str) -> None:
    (part,) = (part for part in load_profile("wan2.1-t2v-14b").parts if part.role == "text_encoder")
    sizes = [torch.Size(shape).numel() * 2 for shape in layout_of(part).values()]
    torch.zeros(1, device="cuda")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    held = _WAYS[name](sizes)
    seconds = time.monotonic() - begun
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found = {"way": name, "seconds": round(seconds, 2), "gib": round(sum(sizes) / 2**30, 2)}
    print(json.dumps({**found, "grown_gib": round(grown / 2**20, 2), "pinned": held[-1].is_pinned()}), flush=True)


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _touched(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def _registered(size: int) -> torch.Tensor:
    tensor = _touched(size)
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)
    if int(status) != 0:
        raise RuntimeError(f"cudaHostRegister: {status}")
    return tensor


def _in_threads(make: Callable[[int], torch.Tensor]) -> Callable[[list[int]], list[torch.Tensor]]:
    def run(sizes: list[int]) -> list[torch.Tensor]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(make, sizes))

    return run


_WAYS: dict[str, Callable[[list[int]], list[torch.Tensor]]] = {
    "torch, one after the other": lambda sizes: [_pinned(size) for size in sizes],
    "torch, 8 threads": _in_threads(_pinned),
    "touched and registered, one after the other": lambda sizes: [_registered(size) for size in sizes],
    "touched and registered, 8 threads": _in_threads(_registered),
    "touched alone, 8 threads": _in_threads(_touched),
}

if __name__ == "__main__":
    main()
