"""What is said besides when nobody listens at the URL that a command took because none was given.

Owns this hint. Leaves out the options (`ops.options`) and how an error ends the process (`ops.failure`).
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from ops.options import DEFAULT_URL

_P = ParamSpec("_P")


def names_default_url(command: Callable[_P, None]) -> Callable[_P, None]:
    """A command with --url and --url-file, and maybe --config, whose BrokerUnavailableError names the default URL."""

    @wraps(command)
    def naming(*args: _P.args, **kwargs: _P.kwargs) -> None:
        from daemon.errors import BrokerUnavailableError

        try:
            command(*args, **kwargs)
        except BrokerUnavailableError as error:
            if kwargs["url"] != DEFAULT_URL or kwargs["url_file"] is not None or kwargs.get("config") is not None:
                raise
            hint = "that URL is the default: give --url, --url-file or REELD_AMQP_URL for another"
            raise BrokerUnavailableError(f"{error}\n{hint}") from error

    return naming
