"""One tree of errors; an error's class says what happens next.

Job errors end a job (`PermanentJobError`) or have it tried again (`TransientJobError`). `FatalError`s end the
process with a documented exit status. Nothing in reeld decides by an error's text.
"""

from collections.abc import Sequence
from enum import IntEnum, StrEnum
from typing import Any


class ExitStatus(IntEnum):
    """Exit statuses of the `reeld` command and of the ranks (documented in the README)."""

    OK = 0
    FAILED = 1
    USAGE = 2
    JOB_FAILED = 3
    GROUP_BROKEN = 70
    CUDA_FORKED = 71
    UNAVAILABLE = 75
    NOPERM = 77
    CONFIG = 78


class ErrorCode(StrEnum):
    """The closed list of codes a `failed` event or a dead letter may carry."""

    MALFORMED_JOB = "malformed_job"
    UNSUPPORTED_TASK = "unsupported_task"
    JOB_ID_CONFLICT = "job_id_conflict"
    INPUT_UNAVAILABLE = "input_unavailable"
    INPUT_REJECTED = "input_rejected"
    OUT_OF_MEMORY = "out_of_memory"
    TIME_LIMIT_EXCEEDED = "time_limit_exceeded"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    WORKER_LOST = "worker_lost"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    INTERNAL = "internal"


class ReeldError(Exception):
    """Root of reeld's own errors."""


class JobError(ReeldError):
    """Raised when a job cannot go on. `path` names the field at fault, like `parameters.height`."""

    retryable = False

    def __init__(self, code: ErrorCode, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.path = path


class PermanentJobError(JobError):
    """Raised when trying again cannot help: the job goes to the dead-letter queue at once."""


class TransientJobError(JobError):
    """Raised when trying again may help: in place first, then over the retry ladder."""

    retryable = True


class JobCancelled(JobError):  # noqa: N818  nothing went wrong
    """Raised when somebody asked for the job's end."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.CANCELLED, "cancelled on request")


class JobHandedBack(ReeldError):  # noqa: N818  nothing went wrong
    """Raised when the daemon must give an unfinished job back to the queue: it is not the job's fault."""


class FatalError(ReeldError):
    """Raised when the process cannot go on; ends it with `exit_status` and one line that says what to do."""

    exit_status = ExitStatus.FAILED


class ConfigError(FatalError):
    """Raised when the configuration, a model folder or the topology is not what it must be."""

    exit_status = ExitStatus.CONFIG


class CredentialsError(FatalError):
    """Raised when the broker refuses the user, the password or the virtual host."""

    exit_status = ExitStatus.NOPERM


class BrokerUnavailableError(ReeldError):
    """Raised when the broker cannot be reached right now."""


class PublishError(ReeldError):
    """Raised when a message was not confirmed by the broker."""


class UnroutablePublishError(PublishError):
    """Raised when a mandatory message reached no queue."""


class GroupBrokenError(ReeldError):
    """Raised when the ranks no longer agree: the process group must be started afresh.

    `outcomes` are those (`parallel.plan.Outcome`) that were reported; the others never will be.
    """

    def __init__(self, message: str, outcomes: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.outcomes = tuple(outcomes)
