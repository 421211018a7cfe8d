"""The URL of a broker: whether it is one, and how much of it may be shown.

Owns both for every place that one comes from: `broker.url`, the content of `broker.url_file`, `--url`. A special
character that is not escaped cuts a URL in the wrong place, and then any part of it may be the password: nothing here
repeats one that is refused. Leaves out connecting (`daemon.connection`).
"""

from urllib.parse import urlsplit, urlunsplit

_ADVICE = "percent-encode special characters in the user and the password (/ is %2F, # is %23, ? is %3F, @ is %40)"


def check_broker_url(url: str) -> None:
    """Raises ValueError, in words that hold nothing of the URL, for one that no broker can have."""
    if not url.startswith(("amqp://", "amqps://")):
        raise ValueError("must start with amqp:// or amqps://")
    if not url.isprintable() or " " in url:  # urlsplit would leave out line breaks
        raise ValueError(f"holds a space or a line break: {_ADVICE}")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        # `from None`: urlsplit's error quotes what it took for the port or the host.
        raise ValueError(f"has a port that is none, or is cut by a special character: {_ADVICE}") from None
    if "#" in url or "@" in parts.path or "@" in parts.query:
        raise ValueError(f"is cut by a special character: {_ADVICE}")
    if not host:
        raise ValueError("names no host; the form is amqp://USER:PASSWORD@HOST:PORT/VHOST")
    if parts.username is not None and parts.password is None:
        raise ValueError("names no password; the form is amqp://USER:PASSWORD@HOST:PORT/VHOST")


def redacted(url: str) -> str:
    """The URL without its password, fit for logs. Nothing of one that cannot be understood; never raises."""
    try:
        check_broker_url(url)
    except ValueError:
        return "a URL that is none"
    parts = urlsplit(url)
    user = f"{parts.username}@" if parts.username else ""
    return urlunsplit((parts.scheme, f"{user}{parts.netloc.rpartition('@')[2]}", parts.path, "", ""))
