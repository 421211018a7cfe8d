"""Step caching, opt-in and lossy: steps whose timestep moved little reuse what the blocks added at the last full one.

Owns TeaCache's decision (https://arxiv.org/abs/2411.19108) with DiffSynth's polynomials. The decision depends on the
timestep's embedding alone, so all of it is taken before the loop, alike on every rank, and nothing waits for the
device. DiffSynth's own TeaCache fails in parallel: it keeps the whole sequence and subtracts a slice. Leaves out the
residual itself, which each rank keeps for its slice (`parallel.forward`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffsynth.models.wan_video_dit import sinusoidal_embedding_1d
from diffsynth.pipelines.wan_video import TeaCache


@dataclass(frozen=True, slots=True)
class StepCache:
    """reuse[step]: whether a step leaves the blocks out."""

    reuse: tuple[bool, ...]

    @property
    def active(self) -> bool:
        return any(self.reuse)

    @staticmethod
    def plan(
        experts: list[Any],
        timesteps: list[float],
        *,
        switch_boundary: float,
        threshold: float | None,
        model_id: str,
        dtype: torch.dtype,
    ) -> "StepCache":
        """Which steps to leave out; none where `threshold` is None. `model_id` names TeaCache's polynomial.

        Raises ValueError for a model that has none.
        """
        if threshold is None:
            return StepCache((False,) * len(timesteps))
        coefficients = TeaCache(len(timesteps), threshold, model_id).coefficients
        reuse: list[bool] = []
        accumulated, previous, previous_expert = 0.0, None, None
        for step, value in enumerate(timesteps):
            expert = experts[-1] if len(experts) > 1 and value < switch_boundary * 1000 else experts[0]
            modulation = _modulation(expert, value, dtype)
            if step in (0, len(timesteps) - 1) or expert is not previous_expert:
                reuse.append(False)
                accumulated = 0.0
            else:
                assert previous is not None
                change = float((modulation - previous).abs().mean() / previous.abs().mean())
                accumulated += float(np.poly1d(coefficients)(change))
                reuse.append(accumulated < threshold)
                if not reuse[-1]:
                    accumulated = 0.0
            previous, previous_expert = modulation, expert
        return StepCache(tuple(reuse))


def _modulation(expert: Any, timestep: float, dtype: torch.dtype) -> torch.Tensor:
    device = expert.time_projection[1].weight.device
    value = torch.tensor([timestep], dtype=torch.float32).to(dtype=dtype, device=device)
    result: torch.Tensor = expert.time_projection(
        expert.time_embedding(sinusoidal_embedding_1d(expert.freq_dim, value))
    )
    return result
