"""`reeld health`: asks the launcher of a running worker whether it is ready, or alive.

Owns the question and how the answer looks. Leaves out the verdict (`daemon.vitals`).
"""

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path

from daemon.config import load_config
from ops.failure import CommandFailedError, UsageError

_TIMEOUT_SECONDS = 10.0


def base_url(url: str | None, config_path: Path | None) -> str:
    """Where to ask: as told, or as the configuration has it. Raises UsageError, ConfigError."""
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise UsageError("--url must start with http:// or https://")
        return url.rstrip("/")
    if config_path is None:
        raise UsageError("give --config, or the endpoint with --url")
    listen = load_config(config_path).metrics.listen
    if listen == "off" or listen.endswith(":0"):
        raise UsageError(f"{config_path}: metrics.listen is {listen}; give the endpoint with --url")
    return f"http://{listen}"


def health(url: str, *, live: bool) -> list[str]:
    """The reasons against, one a line; empty when all is well. Raises CommandFailedError when nobody answers."""
    asked = f"{url}/{'livez' if live else 'readyz'}"
    try:
        with urllib.request.urlopen(asked, timeout=_TIMEOUT_SECONDS) as response:
            body = response.read()
    except urllib.error.HTTPError as error:
        with error:
            if error.code != http.client.SERVICE_UNAVAILABLE:
                raise CommandFailedError(f"{asked}: {error.code} {error.reason}") from error
            body = error.read()
    except (OSError, http.client.HTTPException) as error:
        raise CommandFailedError(f"{asked}: {getattr(error, 'reason', error)}") from error
    try:
        reasons = json.loads(body)["reasons"]
        return [_line(**reason) for reason in reasons]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandFailedError(f"{asked}: not reeld's answer") from error


def _line(*, reason: str, message: str, rank: int | None = None) -> str:
    return f"{reason}: {message}" if rank is None else f"{reason}: rank {rank}: {message}"
