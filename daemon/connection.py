"""Opening connections to the broker; the one place where pika's connection errors become reeld's.

Owns the connection parameters, the translation of errors and the backoff. Leaves out what is done on a
connection.
"""

import socket
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pika
import pika.exceptions
import tenacity
from pika.adapters.blocking_connection import BlockingConnection

from daemon.config import BrokerConfig
from daemon.errors import BrokerUnavailableError, ConfigError, CredentialsError
from daemon.tables import install as read_tables_safely

read_tables_safely()

# What pika, TLS and the socket raise for a connection that is lost or cannot be had right now.
LOST = (pika.exceptions.AMQPError, OSError)


def redacted(url: str) -> str:
    """The URL without its password, fit for logs."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    user = f"{parts.username}@" if parts.username else ""
    return urlunsplit((parts.scheme, f"{user}{host}{port}", parts.path, "", ""))


def connect(broker: BrokerConfig, *, name: str) -> BlockingConnection:
    """Opens a connection once.

    Raises CredentialsError (user, password or virtual host refused), ConfigError (TLS on a plain port or the
    like) and BrokerUnavailableError (anything that may pass).
    """
    url = broker.resolved_url()
    shown = redacted(url)
    parameters = pika.URLParameters(url)
    parameters.heartbeat = broker.heartbeat_seconds
    parameters.socket_timeout = broker.connect_timeout_seconds
    parameters.stack_timeout = broker.connect_timeout_seconds + 5
    parameters.blocked_connection_timeout = None
    parameters.client_properties = {"connection_name": name, "product": "reeld"}
    if broker.ca_file is not None:
        context = ssl.create_default_context(cafile=str(broker.ca_file))
        parameters.ssl_options = pika.SSLOptions(context, parameters.host)
    try:
        return BlockingConnection(parameters)
    except pika.exceptions.ProbableAuthenticationError as error:
        raise CredentialsError(f"{shown}: the broker refused the user or the password") from error
    except pika.exceptions.ProbableAccessDeniedError as error:
        raise CredentialsError(f"{shown}: the broker refused the virtual host {parameters.virtual_host!r}") from error
    except ssl.SSLError as error:
        raise ConfigError(
            f"{shown}: TLS failed ({error.reason or error}): wrong port, or a missing ca_file?"
        ) from error
    except (pika.exceptions.AMQPError, socket.gaierror, OSError) as error:
        cause = error.args[0] if error.args else error
        text = str(getattr(cause, "exception", cause) or type(error).__name__)
        raise BrokerUnavailableError(f"{shown}: {type(error).__name__} {text}".strip()) from error


def connect_with_backoff(
    broker: BrokerConfig,
    *,
    name: str,
    on_retry: Callable[[str, float], None],
    sleep: Callable[[float], Any],
    stopped: Callable[[], bool],
) -> BlockingConnection | None:
    """Opens a connection, trying for ever with exponential backoff and full jitter. None when `stopped()`.

    `on_retry(reason, delay_seconds)` is called before each pause. CredentialsError and ConfigError pass
    through.
    """

    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        delay = state.next_action.sleep if state.next_action else 0.0
        on_retry(str(error), delay)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(BrokerUnavailableError),
        wait=tenacity.wait_random_exponential(
            multiplier=broker.backoff_initial_seconds, max=broker.backoff_max_seconds
        ),
        stop=lambda _state: stopped(),
        sleep=sleep,
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return retrying(connect, broker, name=name)
    except BrokerUnavailableError:
        return None
