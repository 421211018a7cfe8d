"""How an expected error looks to who ran the command: lines on stderr and an exit status.

Owns the translation of reeld's errors to exit statuses. Leaves out the errors (`daemon.errors`).
"""

import os
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
    """Prints an expected error, each line behind `reeld: `, and returns its status. Raises any other.

    Into the journal each line goes as `reeld run` logs a fatal one: whoever parses its logs need not know that it had
    not begun.
    """
    status = _status(error)
    if status is None:
        raise error
    lines = str(error).splitlines() or [type(error).__name__]
    if _writes_to_journal():
        _log_fatal(lines, int(status))
    else:
        for line in lines:
            print(f"reeld: {line}", file=sys.stderr)
    return int(status)


def _writes_to_journal() -> bool:
    """As systemd.exec(5) says: $JOURNAL_STREAM is inherited by whoever has another stderr by now."""
    try:
        about = os.fstat(2)
    except OSError:  # closed
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{about.st_dev}:{about.st_ino}"


def _log_fatal(lines: list[str], status: int) -> None:
    import structlog

    from daemon.logs import setup_logs

    setup_logs(format_="json", level="info", rank=None, local_rank=None, world_size=None, capture=False)
    for line in lines:
        structlog.get_logger("process").critical("fatal", reason=line, exit_status=status)


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
