"""`reeld doctor` on TLS: the broker's certificate, who vouches for it, its names and when it ends.

Owns one handshake of its own, with the same trust as the daemon's. Leaves out AMQP.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from daemon.connection import tls_context
from daemon.errors import ConfigError
from daemon.sections import BrokerConfig
from ops.finding import Finding

_AMQPS_PORT = 5671
_SOON_DAYS = 30
# OpenSSL's numbers, from x509_vfy.h.
_EXPIRED, _NOT_YET, _OTHER_NAME = 10, 9, 62


def examine_tls(broker: BrokerConfig) -> Iterator[Finding]:
    """Nothing where the connection is plain and stays on this machine."""
    parts = urlsplit(broker.resolved_url())
    host = parts.hostname or ""
    if parts.scheme != "amqps":
        if not _is_loopback(host):
            text = f"amqp://{host}: the password and every job cross the network in clear"
            yield Finding(
                "TLS", "warn", text, "use amqps:// in broker.url, with broker.ca_file for an authority of yours"
            )
        return
    try:
        certificate, version = _handshake(broker, host, parts.port or _AMQPS_PORT)
    except ssl.SSLCertVerificationError as error:
        yield Finding("TLS", "fail", f"{host}: {error.verify_message}", _fix(error.verify_code, host, broker))
    except ConfigError as error:
        yield Finding(
            "TLS", "fail", str(error), "correct these files: PEM, without a passphrase, readable by the worker"
        )
    except (OSError, ssl.SSLError) as error:
        text = f"{host}: no TLS: {error}"
        yield Finding("TLS", "fail", text, "is that the broker's TLS port (5671), and is it up?")
    else:
        yield _lifetime(certificate, version, host)


def _handshake(broker: BrokerConfig, host: str, port: int) -> tuple[dict[str, object], str]:
    with (
        socket.create_connection((host, port), timeout=broker.connect_timeout_seconds) as plain,
        tls_context(broker).wrap_socket(plain, server_hostname=host) as secure,
    ):
        return dict(secure.getpeercert() or {}), secure.version() or "TLS"


def _lifetime(certificate: dict[str, object], version: str, host: str) -> Finding:
    ends = str(certificate["notAfter"])
    days = (ssl.cert_time_to_seconds(ends) - time.time()) / 86_400
    names = ", ".join(str(each[1]) for each in certificate.get("subjectAltName", ()))  # type: ignore[attr-defined]
    text = f"{version}; the certificate is for {names}, and valid for {days:.0f} more days, until {ends}"
    if days < _SOON_DAYS:
        fix = "renew the broker's certificate; once it has ended, no worker can connect any more"
        return Finding("TLS", "warn", text, fix)
    return Finding("TLS", "ok", text)


def _fix(verify_code: int, host: str, broker: BrokerConfig) -> str:
    match verify_code:
        case code if code == _EXPIRED:
            return "renew the broker's certificate"
        case code if code == _NOT_YET:
            return "set this machine's clock, or wait until the certificate is valid"
        case code if code == _OTHER_NAME:
            return f"connect by a name that the certificate has, or have one made that names {host}"
    if broker.ca_file is None:
        return "set broker.ca_file to the certificate of the authority that signed the broker's"
    return f"{broker.ca_file} holds another authority than the one that signed the broker's certificate"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
