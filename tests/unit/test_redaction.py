"""Secrets in text: the known ones in every spelling, and what looks like one; the rest stays readable."""

import json
from pathlib import Path

import pytest

from daemon.sections import BrokerConfig
from ops.redaction import REMOVED, Redactor, known_secrets

KEY = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIPlantedKeyBytes\nabcd==\n-----END EC PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text",
    [
        "connect to amqp://user:p1anted@host:5672/vhost failed",
        "amqps://:p1anted@host/",
        "amqp://user:p1an@ted@host/ failed",
        "https://bucket/x?X-Amz-Signature=p1anted&y=1",
        "--password p1anted --verbose",
        "password=p1anted",
        'PASSWORD: "p1anted phrase"',
        '{"broker_password": "p1anted"}',
        '{"text": "{\\"api_key\\": \\"p1anted\\"}"}',
        "Authorization: Bearer p1anted.p1anted",
        "authorization: Basic cDFhbnRlZDpwMWFudGVk p1anted",
        "bearer p1anted-token-0123",
        "db_secret = 'p1anted'",
        KEY.replace("Planted", "p1anted"),
        json.dumps({"text": KEY.replace("Planted", "p1anted")}),
        KEY.replace("Planted", "p1anted")[:60],
        KEY.replace("Planted", "p1anted")[31:],
    ],
)
def test_what_looks_like_a_secret_is_removed(text: str) -> None:
    cleaned = Redactor([]).clean(text)
    assert "p1an" not in cleaned
    assert REMOVED in cleaned


def test_known_secrets_go_in_every_spelling() -> None:
    """As it is, as JSON has it, as JSON in JSON has it, as a URL has it."""
    secret = 'p"a/ß word'
    redactor = Redactor([secret])
    once = json.dumps(secret)
    for text in (
        f"x {secret} y",
        once,
        json.dumps(once),
        "p%22a%2F%C3%9F%20word",
        json.dumps(secret, ensure_ascii=False),
    ):
        assert REMOVED in redactor.clean(text), text
        assert "word" not in redactor.clean(text)


def test_the_rest_stays_as_it_is() -> None:
    """Log lines without secrets are not touched, and JSON stays JSON."""
    redactor = Redactor(["guest", "abc"])
    for text in (
        '{"event": "job_started", "host": "box", "tokenizer": "umt5", "step": 3, "keys": 12}',
        "amqp://guest@127.0.0.1:5672/vhost: guest connected, abc",
        "model_loaded seconds=3.2 file=/models/passes/x.safetensors",
    ):
        assert redactor.clean(text) == text
    value = {"password": "x1234", "n": 3, "list": ["amqp://a:b1234@h/"], "deep": {"api_key": "y1234", "b": None}}
    cleaned = redactor.clean_json(value)
    assert cleaned == {
        "password": REMOVED,
        "n": 3,
        "list": [f"amqp://a:{REMOVED}@h/"],
        "deep": {"api_key": REMOVED, "b": None},
    }
    line = json.dumps({"event": "x", "token": 'a"b', "other": 'say \\"password\\": \\"q1234\\" end'})
    assert json.loads(redactor.clean(line))["token"] == REMOVED


def test_the_password_of_the_url_is_known_decoded_and_not() -> None:
    assert known_secrets(BrokerConfig(url="amqp://u:p%40ss1@h/")) == {"p%40ss1", "p@ss1"}


def test_of_a_url_that_cannot_be_understood_every_piece_is_a_secret(tmp_path: Path) -> None:
    """Which piece is the password nobody knows; a library may have shown any of them."""
    file = tmp_path / "url"
    file.write_text("amqp://u:S3cretPart/w0rd#m0re@host:5672/\n")
    redactor = Redactor(known_secrets(BrokerConfig(url_file=file)))
    cleaned = redactor.clean(
        "integer value as 'S3cretPart'; path /w0rd; u:S3cretPart/w0rd#m0re@host; fragment m0re@host"
    )
    assert cleaned.count(REMOVED) >= 4
    for piece in ("S3cret", "w0rd", "m0re"):
        assert piece not in cleaned
