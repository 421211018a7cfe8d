"""How long page-locked memory takes to be made, by each way there is, and who else waits for the driver meanwhile.

    python -m benchmarks.gpu.pinning --gib 10.6 --output FILE

The text encoder's weights wait in such memory (`parallel.host_memory`) and are made while others load. Each way runs in
a process of its own, on memory that the machine has given out before, because some machines grow theirs as it is used.
Beside the time of all slabs: how many small copies to the GPU came through meanwhile in another thread, and the longest
that one took.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_SLAB_BYTES = 512 << 20
_COPY_BYTES = 32 << 20
_THREADS = 8
_BY_REGISTERING = f"pinned_use_cuda_host_register:True,pinned_num_register_threads:{_THREADS}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=10.6)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=_WAYS, help="this one, here; without it each in a process of its own")
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(_measure(_WAYS[options.way], round(options.gib * 2**30 / _SLAB_BYTES))))
        return
    rows = {}
    for way in _WAYS:
        environment = dict(os.environ)
        if way.startswith("registered by torch"):
            environment["PYTORCH_CUDA_ALLOC_CONF"] = environment["PYTORCH_ALLOC_CONF"] = _BY_REGISTERING
        command = [sys.executable, "-m", "benchmarks.gpu.pinning", "--gib", str(options.gib), "--way", way]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        rows[way] = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr[-300:]}
        print(way, rows[way], flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1))


def _measure(make: Callable[[], torch.Tensor], slabs: int) -> dict[str, float]:
    _touch(torch.empty(slabs * _SLAB_BYTES, dtype=torch.uint8))  # the machine has it from here on
    on_device = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    took: list[float] = []
    over = threading.Event()

    def copy() -> None:
        while not over.is_set():
            begun = time.perf_counter()
            on_device.copy_(source, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            took.append(time.perf_counter() - begun)

    other = threading.Thread(target=copy)
    other.start()
    begun = time.perf_counter()
    kept = [make() for _ in range(slabs)]
    seconds = time.perf_counter() - begun
    over.set()
    other.join()
    return {"seconds": round(seconds, 3), "slabs": len(kept), "copies": len(took), "longest_copy": round(max(took), 3)}


def _touch(memory: torch.Tensor) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(lambda part: part.zero_(), memory.chunk(_THREADS)))


def _allocated() -> torch.Tensor:
    return torch.empty(_SLAB_BYTES, dtype=torch.uint8, pin_memory=True)


def _registered() -> torch.Tensor:
    memory = torch.empty(_SLAB_BYTES, dtype=torch.uint8)
    _touch(memory)
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), _SLAB_BYTES, 0)
    assert status == 0, status
    return memory


def _ordinary() -> torch.Tensor:
    memory = torch.empty(_SLAB_BYTES, dtype=torch.uint8)
    _touch(memory)
    return memory


_WAYS = {
    "allocated": _allocated,
    "registered by torch": _allocated,
    "registered": _registered,
    "ordinary memory": _ordinary,
}


if __name__ == "__main__":
    main()
