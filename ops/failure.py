"""How an expected error looks to who ran the command: lines on stderr and an exit status.

Owns the translation of reeld's errors to exit statuses. Leaves out the errors (`daemon.errors`).
"""

import sys

from daemon.errors import (
    BrokerUnavailableError,
    ConfigError,
    ExitStatus,
    FatalError,
    PublishError,
    UnroutablePublishError,
)
from ops.private_broker import PrivateBrokerError


class UsageError(FatalError):
    """Raised when the command was given something that cannot be used."""

    exit_status = ExitStatus.USAGE


class CommandFailedError(FatalError):
    """Raised when a command did not reach its end. The message may have several lines."""


class JobFailedError(FatalError):
    """Raised when the job that was waited for failed or was cancelled."""

    exit_status = ExitStatus.JOB_FAILED


def report(error: Exception) -> int:
    """Prints an expected error, each line behind `reeld: `, and returns its status. Raises any other."""
    status = _status(error)
    if status is None:
        raise error
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"reeld: {line}", file=sys.stderr)
    return int(status)


def _status(error: Exception) -> ExitStatus | None:
    match error:
        case FatalError():
            return error.exit_status
        case UnroutablePublishError():
            return ConfigError.exit_status
        case BrokerUnavailableError() | PublishError():
            return ExitStatus.UNAVAILABLE
        case PrivateBrokerError():
            return ExitStatus.FAILED
        case _:
            return None
