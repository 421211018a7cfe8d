"""How one rank's part of a generation ended: the errors that end it, and the outcome each becomes.

Owns the errors that the parts of `parallel` raise on purpose, and the one place that turns an error into an
`Outcome`. Leaves out what an outcome means for the job (`daemon.attempt`).
"""

from enum import IntEnum

import torch

from parallel.lora_layout import LoraError
from parallel.plan import Outcome


class Stop(IntEnum):
    """Rank 0's decision before a step, applied by every rank."""

    NO = 0
    CANCELLED = 1
    TIME_LIMIT_EXCEEDED = 2
    HAND_BACK = 3


class StoppedError(Exception):
    """Raised on every rank, at the same step, when rank 0 decided to stop."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.name.lower())
        self.stop = stop


class NonFiniteError(Exception):
    """Raised when the latents or the frames hold a NaN or an infinity."""


class InconsistentError(Exception):
    """Raised before the first step when tensors are not on the rank's device or not of the model's dtype."""


class DivergedError(Exception):
    """Raised when ranks that must hold the same latents do not: their group must be started afresh."""


class PreparationError(Exception):
    """Raised on the peers when rank 0 failed while preparing the conditions; `code` is what rank 0 reports."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def outcome_of(error: BaseException | None, rank: int) -> Outcome:
    """The outcome of a generation that raised `error`, or of one that went well."""
    match error:
        case None:
            return Outcome(rank=rank)
        case StoppedError(stop=stop):
            return Outcome(rank=rank, code=stop.name.lower(), message=f"stopped on request: {stop.name.lower()}")
        case PreparationError(code=code):
            return Outcome(rank=rank, code=code, message=_first_line(error))
        case LoraError():
            return Outcome(rank=rank, code="input_rejected", message=_first_line(error))
        case NonFiniteError():
            return Outcome(rank=rank, code="non_finite", message=_first_line(error))
        case DivergedError():
            return Outcome(rank=rank, code="diverged", message=_first_line(error))
        case torch.OutOfMemoryError() | MemoryError():
            return Outcome(rank=rank, code="out_of_memory", message=_first_line(error))
        case _:
            return Outcome(rank=rank, code="internal", message=f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:500]
