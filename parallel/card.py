"""What a card is doing while something is timed: its clock, power and temperature, and its measured peak.

A card at its power limit lowers its clock, so a figure without its clock compares with nothing. Leaves out what is
timed (`parallel.bench`).
"""

import statistics
import threading
import time
from typing import Any

import torch

_INTERVAL_SECONDS = 0.05


class CardSampler:
    """Samples the card while its block runs. On a CPU, or where NVML cannot be asked, it knows nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._rows: list[tuple[float, float, float]] = []
        self._thread = threading.Thread(target=self._run, name="card", daemon=True)

    def __enter__(self) -> "CardSampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        if self._device.type != "cuda":
            return
        try:
            while not self._stop.wait(_INTERVAL_SECONDS):
                self._rows.append(
                    (
                        torch.cuda.clock_rate(self._device),
                        torch.cuda.power_draw(self._device) / 1000,
                        torch.cuda.temperature(self._device),
                    )
                )
        except (ImportError, RuntimeError):
            return  # nvidia-ml-py is not there, or the driver does not say

    def medians(self) -> dict[str, float]:
        """`sm_mhz`, `watts` and `celsius`; empty where nothing could be sampled."""
        names = ("sm_mhz", "watts", "celsius")
        return {name: statistics.median(row[i] for row in self._rows) for i, name in enumerate(names) if self._rows}


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The measured peak of a square matrix product, in TFLOP/s: its best moment, and kept up for two seconds.

    No step can beat the first; under a power limit the second is what there is.
    """
    size, seconds_kept_up = (8192, 2.0) if device.type == "cuda" else (1024, 0.5)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    synchronise(device)
    rates: list[float] = []
    with CardSampler(device) as sampler:
        until = time.perf_counter() + seconds_kept_up
        while time.perf_counter() < until:
            begun = time.perf_counter()
            for _ in range(4):
                a @ b
            synchronise(device)
            rates.append(2 * size**3 * 4 / (time.perf_counter() - begun) / 1e12)
    last = rates[-max(1, len(rates) // 4) :]
    return {"best": round(max(rates), 3), "kept_up": round(statistics.median(last), 3), **sampler.medians()}


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
