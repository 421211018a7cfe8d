"""Secrets taken out of text: those that are known, and whatever looks like one.

Owns what counts as a secret. Errs on the side of removing too much. Leaves out which texts there are
(`ops.support_bundle`).
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from daemon.broker_url import check_broker_url
from daemon.errors import ConfigError
from daemon.sections import BrokerConfig

REMOVED = "[removed]"
_SHORTEST = 4
# RabbitMQ's default and our own name, which are no secrets and half of the words in the logs.
_KNOWN_TO_ALL = ("guest", "reeld")
_CREDENTIAL_BYTES = 65_536
_BETWEEN_PIECES = re.compile(r"[/:?#@\[\]\s]+")

_KEY = r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----"
_KEY_END = r"-----END [A-Z0-9 ]*PRIVATE KEY-----"
_WORDS = r"(?:pass(?:word|wd|phrase)?|secret|token|(?:api|access|private)[_-]?key|credentials?|signature|sig)"
_SECRET_NAME = re.compile(rf"(?i)[\w.-]*{_WORDS}")
# name = value, "name": "value" and ?name=value, where the name ends like one of a secret; the value may be quoted, and
# the quotes may be escaped, as in JSON within JSON.
_NAMED = re.compile(
    rf"(?i)(?P<name>[\w.-]*{_WORDS}\\?[\"']?\s*[:=]\s*)"
    r"(?P<value>\\\"(?:[^\"\\]|\\[^\"])*(?:\\\")?|\"(?:[^\"\\]|\\.)*\"?|'[^']*'?|[^\s,;&\"'}\]]+)"
)
_PATTERNS = (
    (re.compile(f"{_KEY}.*?{_KEY_END}", re.DOTALL), REMOVED),
    # Half of a key, where a log was cut: all that may belong to it.
    (re.compile(f"^.*?{_KEY_END}", re.DOTALL), REMOVED),
    (re.compile(f"{_KEY}.*$", re.DOTALL), REMOVED),
    # user:password@ in any URL, also where the password holds an @.
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/:@\"'<>]*):[^\s\"'<>]*@"), rf"\1:{REMOVED}@"),
    (re.compile(r"(?i)\b(authorization[\"']?\s*[:=]\s*[\"']?)[^\"'\r\n]+"), rf"\1{REMOVED}"),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9+/=._~-]{8,}"), rf"\1{REMOVED}"),
    (re.compile(rf"(?i)(--[\w-]*{_WORDS}\s+)\S+"), rf"\1{REMOVED}"),
)


class Redactor:
    """Takes the given secrets out of text, in every spelling that JSON and URLs give them, and what looks like one."""

    def __init__(self, secrets: Iterable[str]) -> None:
        spelt = {
            form
            for secret in secrets
            if len(secret.strip()) >= _SHORTEST and secret not in _KNOWN_TO_ALL
            for form in _spellings(secret.strip())
        }
        self._known = sorted(spelt, key=len, reverse=True)

    def clean(self, text: str) -> str:
        for secret in self._known:
            text = text.replace(secret, REMOVED)
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        return _NAMED.sub(_without_value, text)

    def clean_json(self, value: Any) -> Any:
        """The same for a value that is JSON, which stays JSON."""
        match value:
            case str():
                return self.clean(value)
            case dict():
                return {self.clean(str(name)): self._clean_named(str(name), each) for name, each in value.items()}
            case list() | tuple():
                return [self.clean_json(each) for each in value]
        return value

    def _clean_named(self, name: str, value: Any) -> Any:
        return REMOVED if isinstance(value, str) and _SECRET_NAME.fullmatch(name) else self.clean_json(value)


def known_secrets(broker: BrokerConfig | None) -> set[str]:
    """The broker's password, and what is in the credentials that systemd gave us."""
    secrets: set[str] = set()
    if broker is not None:
        secrets |= _of_url(broker.url)
        with contextlib.suppress(ConfigError):  # what cannot be read cannot be told either
            secrets |= _of_url(broker.unchecked_url())
    for name in ("REELD_AMQP_URL", "REELD_BROKER__URL"):
        secrets |= _of_url(os.environ.get(name, ""))
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder:
        for path in Path(folder).glob("*"):
            if path.is_file() and path.stat().st_size <= _CREDENTIAL_BYTES:
                text = path.read_text(errors="replace")
                secrets |= {text.strip(), *(line.strip() for line in text.splitlines())}
                if "://" in text:
                    secrets |= _of_url(text.strip())
    return secrets


def _of_url(url: str) -> set[str]:
    """The password. Of what is no URL of a broker every piece: which of them is the password nobody knows."""
    try:
        check_broker_url(url)
    except ValueError:
        rest = url.partition("://")[2] or url
        return {rest, *_BETWEEN_PIECES.split(rest)} - {""}
    password = urlsplit(url).password
    return {password, unquote(password)} if password else set()


def _spellings(secret: str) -> set[str]:
    once = json.dumps(secret)[1:-1]
    return {secret, once, json.dumps(once)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], quote(secret, safe="")}


def _without_value(found: re.Match[str]) -> str:
    value = found["value"]
    mark = next((each for each in ('\\"', '"', "'") if value.startswith(each)), "")
    return f"{found['name']}{mark}{REMOVED}{mark}"
