"""Connections to the broker: opening them, and noticing that they are dead.

Owns the connection parameters, the translation of pika's errors into reeld's, the backoff, and what pika's own
connection lacks: a silent peer is noticed within the heartbeat and a few seconds, a wait can have a deadline, and it
is known whether the broker blocks publishers. Leaves out what is done on a connection.
"""

import contextlib
import random
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pika.exceptions
import tenacity
from pika.adapters.blocking_connection import BlockingConnection
from pika.adapters.select_connection import SelectConnection
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.heartbeat import HeartbeatChecker

from daemon.broker_url import redacted
from daemon.errors import BrokerUnavailableError, ConfigError, CredentialsError, FatalError
from daemon.sections import BrokerConfig
from daemon.tables import install as read_tables_safely

read_tables_safely()

# What pika, TLS and the socket raise for a connection that is lost or cannot be had right now.
LOST = (pika.exceptions.AMQPError, OSError)

# AMQP's access-refused and not-allowed: what RabbitMQ closes a connection with that it does not want.
_REFUSALS = (403, 530)
# 530 is also what RabbitMQ closes a connection with that is one too many, for its user or its virtual host. That may
# pass: connections that were lost count until the broker has missed their heartbeats. No other field tells them apart.
_LIMIT = re.compile(r"connection limit \(\d+\) is reached")
_ENDED = (pika.exceptions.StreamLostError, pika.exceptions.ConnectionClosedByBroker)
_TICK_SECONDS = 1.0
_SILENT_SECONDS = 2


class OverdueError(pika.exceptions.AMQPConnectionError):  # type: ignore[misc]  # pika ships no types
    """Raised when the broker did not answer within a deadline: the connection was dropped."""


class _Heartbeat(HeartbeatChecker):  # type: ignore[misc]  # pika ships no types
    """Looks for silence every second.

    pika's own looks every `timeout + 5` seconds, and a connection that died just after a look goes unnoticed for
    two such intervals. The broker sends something every half timeout, so silence for longer than the timeout is death.
    """

    def _start_check_timer(self) -> None:
        self._update_counters()
        self._check_timer = self._connection._adapter_call_later(_TICK_SECONDS, self._check_heartbeat)

    @property
    def connection_is_idle(self) -> bool:
        return bool(self._idle_byte_intervals * _TICK_SECONDS >= self._timeout + _SILENT_SECONDS)


class _LoginLostError(pika.exceptions.AMQPConnectionError):  # type: ignore[misc]  # pika ships no types
    """Raised when a connection ended before it was open, and the broker did not say that it refuses us."""


class _Watched(SelectConnection):  # type: ignore[misc]  # pika ships no types
    def _on_stream_terminated(self, error: Exception | None) -> None:
        # pika takes whatever ends a login, a reset or a broker's shutdown too, for a refused password or virtual host.
        lost = self._error if error is None else error
        refused = (
            isinstance(lost, pika.exceptions.ConnectionClosedByBroker)
            and lost.reply_code in _REFUSALS
            and not _LIMIT.search(lost.reply_text)
        )
        if not self._opened and isinstance(lost, _ENDED) and not refused:
            error = _LoginLostError(f"ended before the login was through, by {lost!r}")
        super()._on_stream_terminated(error)

    def _create_heartbeat_checker(self) -> _Heartbeat | None:
        return _Heartbeat(self, self.params.heartbeat) if self.params.heartbeat else None


class Connection(BlockingConnection):  # type: ignore[misc]  # pika ships no types
    """pika's blocking connection, used by one thread."""

    def __init__(self, parameters: pika.ConnectionParameters) -> None:
        super().__init__(parameters, _impl_class=_Watched)
        self.blocked: str | None = None  # why the broker reads nothing that is published here; None: it does
        # On the inner connection, whose callbacks run in any wait; the outer one's only run in process_data_events.
        self._impl.add_on_connection_blocked_callback(lambda _connection, frame: self._set_blocked(frame))
        self._impl.add_on_connection_unblocked_callback(lambda _connection, _frame: self._set_blocked(None))

    @contextlib.contextmanager
    def deadline(self, seconds: float, *, waits_for_alarms: bool = True) -> Iterator[None]:
        """Ends a wait within by OverdueError after `seconds`.

        The time in which the broker blocks publishers does not count, if one `waits_for_alarms`.
        """
        left = seconds
        timer: object = None

        def tick() -> None:
            nonlocal left, timer
            timer = None
            left -= 0.0 if self.blocked and waits_for_alarms else _TICK_SECONDS
            if left > 0:
                timer = self._impl._adapter_call_later(min(_TICK_SECONDS, left), tick)
            else:
                self._impl._terminate_stream(OverdueError(f"no answer from the broker in {seconds:g} s"))

        timer = self._impl._adapter_call_later(min(_TICK_SECONDS, left), tick)
        try:
            yield
        finally:
            if timer is not None and not self.is_closed:
                self._impl._adapter_remove_timeout(timer)

    def _set_blocked(self, frame: Any) -> None:
        self.blocked = None if frame is None else str(frame.method.reason or "no reason given")


def tls_context(broker: BrokerConfig) -> ssl.SSLContext:
    """Whom we trust and who we are. Raises ConfigError that names the file at fault."""
    try:
        context = ssl.create_default_context(cafile=str(broker.ca_file) if broker.ca_file else None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"broker.ca_file: {broker.ca_file}: {error.strerror or error}") from error
    if broker.cert_file is not None:
        try:
            # A key with a passphrase would have OpenSSL ask for it on a terminal that a service does not have.
            context.load_cert_chain(broker.cert_file, broker.key_file, password=lambda: b"")
        except (OSError, ssl.SSLError) as error:
            files = " and ".join(f"broker.{name} {path}" for name, path in _certificate(broker))
            raise ConfigError(f"{files}: {error.strerror or error}") from error
    return context


def _certificate(broker: BrokerConfig) -> list[tuple[str, object]]:
    pairs = [("cert_file", broker.cert_file), ("key_file", broker.key_file)]
    return [(name, path) for name, path in pairs if path is not None]


def connect(broker: BrokerConfig, *, name: str) -> Connection:
    """Opens a connection once.

    Raises CredentialsError (user, password or virtual host refused), ConfigError (TLS on a plain port, a certificate
    that is not trusted, a parameter of the URL) and BrokerUnavailableError (anything that may pass).
    """
    url = broker.resolved_url()
    shown = redacted(url)
    try:
        parameters = pika.URLParameters(url)
    except (ValueError, TypeError, SyntaxError):  # it evaluates some of the values as Python
        raise ConfigError(f"{shown}: a parameter behind the ? of the URL is not one that pika takes") from None
    parameters.heartbeat = broker.heartbeat_seconds
    parameters.socket_timeout = broker.connect_timeout_seconds
    parameters.stack_timeout = broker.connect_timeout_seconds + 5
    parameters.blocked_connection_timeout = None
    parameters.client_properties = {"connection_name": name, "product": "reeld"}
    if broker.ca_file is not None or broker.cert_file is not None:
        parameters.ssl_options = pika.SSLOptions(tls_context(broker), parameters.host)
    try:
        return Connection(parameters)
    except pika.exceptions.ProbableAuthenticationError as error:
        raise CredentialsError(f"{shown}: the broker refused the user or the password") from error
    except pika.exceptions.ProbableAccessDeniedError as error:
        raise CredentialsError(
            f"{shown}: the broker refused the virtual host {parameters.virtual_host!r}: it is not there, or the user"
            f" has no permissions on it (docs/brokers.md); it says {error}"
        ) from error
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"{shown}: the broker's certificate is not trusted: {error.verify_message}") from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError) as error:
        raise BrokerUnavailableError(f"{shown}: closed during the TLS handshake") from error
    except ssl.SSLError as error:
        raise ConfigError(f"{shown}: no TLS on that port ({error.reason or error}): is it a plain port?") from error
    except ValueError as error:
        # pika's own, out of its loop: a socket that is reset between connect() and getpeername(). Parameters that mean
        # nothing were refused above.
        raise BrokerUnavailableError(f"{shown}: reset while connecting") from error
    except socket.gaierror as error:
        raise BrokerUnavailableError(f"{shown}: the name {parameters.host} does not resolve") from error
    except (pika.exceptions.AMQPError, AMQPConnectorException, OSError) as error:
        cause = error.args[0] if error.args else error
        text = str(getattr(cause, "exception", cause) or type(error).__name__)
        raise BrokerUnavailableError(f"{shown}: {type(error).__name__} {text}".strip()) from error


def backoff_seconds(broker: BrokerConfig, *, waited_seconds: float) -> float:
    """How long to pause in an outage that has lasted so long already: random, at most a fifth of that time.

    So pauses grow exponentially, and a broker that is back is noticed within 1.2 times of its absence. Doubling them
    notices after up to twice that. Full jitter: many daemons must not come back at the same moment.
    """
    ceiling = max(broker.backoff_initial_seconds, waited_seconds / 5)
    return random.uniform(0, min(broker.backoff_max_seconds, ceiling))


def connect_with_backoff(
    broker: BrokerConfig,
    *,
    name: str,
    on_retry: Callable[[str, float], None],
    sleep: Callable[[float], Any],
    stopped: Callable[[], bool],
    fatal: bool = True,
) -> Connection | None:
    """Opens a connection, trying for ever with backoff and jitter (`backoff_seconds`). None when `stopped()`.

    `on_retry(reason, delay_seconds)` is called before each pause. FatalErrors pass through,
    or, when not `fatal`, are tried again like the others: what was accepted once may be accepted again.
    """

    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        delay = state.next_action.sleep if state.next_action else 0.0
        on_retry(str(error), delay)

    def may_pass(error: BaseException) -> bool:
        return isinstance(error, BrokerUnavailableError) or (not fatal and isinstance(error, FatalError))

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=lambda state: backoff_seconds(broker, waited_seconds=state.seconds_since_start or 0),
        stop=lambda _state: stopped(),
        sleep=sleep,
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return retrying(connect, broker, name=name)
    except (BrokerUnavailableError, FatalError) as error:
        if may_pass(error):
            return None
        raise
