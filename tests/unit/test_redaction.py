"""Secrets in text: the known ones in every spelling, and what looks like one; the rest stays readable."""

import json

import pytest

from daemon.config import BrokerConfig
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
