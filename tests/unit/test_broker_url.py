"""A broker's URL: what is refused, in words that repeat nothing of it, and what of it may be shown."""

import pytest

from daemon.broker_url import check_broker_url, redacted

CUT = (
    "amqp://u:S3cretPart/w@host:5672/",
    "amqp://u:S3cretPart#w@host:5672/",
    "amqp://u:S3cretPart?w@host:5672/",
    "amqp://u:1234/S3cretPart@host/",
    "amqp://u:1234?S3cretPart@host/",
    "amqp://u:1234#S3cretPart@host/",
    "amqp://u:[S3cretPart@host/",
    "amqp://u:[S3cretPart]@host/",
    "amqp://u:S3cret\u2100Part@host/",
    "amqp://u:S3cret Part@host/",
    "amqp://u:1\nS3cretPart@host/",
    "amqp://u:S3cretPart@",
    "amqp://u:S3cretPart@/vhost",
    "amqp://u:S3cretPart",
    "amqp://S3cretPart@host",
    "http://u:S3cretPart@host/",
    "S3cretPart",
    "",
)


@pytest.mark.parametrize("url", CUT)
def test_what_is_no_url_of_a_broker_is_refused_without_any_of_it(url: str) -> None:
    """Where a character cut the URL in the wrong place any part may be the password: none is in the fault."""
    with pytest.raises(ValueError, match=r"must start|names no|percent-encode") as caught:
        check_broker_url(url)
    assert "S3c" not in str(caught.value)
    assert "Part" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "a traceback would show it"


@pytest.mark.parametrize("url", CUT)
def test_of_what_is_no_url_nothing_is_shown(url: str) -> None:
    """Logs never hold a part of what cannot be understood, and asking for it never fails."""
    shown = redacted(url)
    assert "S3c" not in shown
    assert "Part" not in shown
    assert "host" not in shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://guest:guest@127.0.0.1:5672/%2F", "amqp://guest@127.0.0.1:5672/%2F"),
        ("amqps://u:p%2Fw%23@host", "amqps://u@host"),
        ("amqps://u:p@w@host/v?heartbeat=5", "amqps://u@host/v"),
        ("amqp://host", "amqp://host"),
        ("amqp://:p@[::1]:5672/", "amqp://[::1]:5672/"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """The user, the host and the virtual host are shown; the password and the parameters are not."""
    check_broker_url(url)
    assert redacted(url) == shown
