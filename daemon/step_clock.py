"""How fast a job goes: seconds a step, the time left, and how long each phase took.

Owns the numbers of a progress event, and measuring the phases and steps of one attempt. Leaves out publishing
(`daemon.reporter`) and the sums (`daemon.metrics`).
"""

import time
from typing import Any

from daemon.measurements import SILENT, Measurements


class StepClock:
    """Over the steps of one attempt so far."""

    def __init__(self, measurements: Measurements = SILENT) -> None:
        self._measurements = measurements
        self._phase: tuple[str, float] | None = None
        self._step: tuple[int, float] | None = None
        self._first: tuple[int, float] | None = None
        self.phase_seconds: dict[str, float] = {}

    def tick(self, phase: str, step: int, steps: int) -> dict[str, Any]:
        """The data of a progress event, at the beginning of a step or of another phase."""
        self._measure(phase, step)
        seconds = self._seconds_per_step(phase, step)
        return {
            "phase": phase,
            "step": step,
            "steps": steps,
            "seconds_per_step": seconds,
            "eta_seconds": None if seconds is None else round(seconds * (steps - step), 3),
        }

    def finish(self) -> None:
        """The attempt is over."""
        self._measure(None, 0)

    def _measure(self, phase: str | None, step: int) -> None:
        now = time.monotonic()
        if self._step is not None and (phase, step) != ("denoise", self._step[0]):
            self._measurements.step(now - self._step[1])
            self._step = None
        if phase == "denoise" and self._step is None:
            self._step = step, now
        if self._phase is not None and self._phase[0] != phase:
            name, since = self._phase
            self._measurements.phase(name, now - since)
            self.phase_seconds[name] = round(self.phase_seconds.get(name, 0.0) + now - since, 3)
            self._phase = None
        if phase is not None and self._phase is None:
            self._phase = phase, now

    def _seconds_per_step(self, phase: str, step: int) -> float | None:
        now = time.monotonic()
        if phase != "denoise" or self._first is None:
            self._first = (step, now) if phase == "denoise" else None
            return None
        first_step, first_time = self._first
        return round((now - first_time) / (step - first_step), 4) if step > first_step else None
