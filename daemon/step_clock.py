"""How fast the denoising goes: seconds a step, and the time left.

Owns the numbers of a progress event. Leaves out publishing it (`daemon.reporter`).
"""

import time
from typing import Any


class StepClock:
    """Over the steps of one attempt so far."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def tick(self, phase: str, step: int, steps: int) -> dict[str, Any]:
        """The data of a progress event, at the beginning of a step or of another phase."""
        seconds = self._seconds_per_step(phase, step)
        return {
            "phase": phase,
            "step": step,
            "steps": steps,
            "seconds_per_step": seconds,
            "eta_seconds": None if seconds is None else round(seconds * (steps - step), 3),
        }

    def _seconds_per_step(self, phase: str, step: int) -> float | None:
        now = time.monotonic()
        if phase != "denoise" or self._first is None:
            self._first = (step, now) if phase == "denoise" else None
            return None
        first_step, first_time = self._first
        return round((now - first_time) / (step - first_step), 4) if step > first_step else None
