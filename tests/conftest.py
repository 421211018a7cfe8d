"""Fixtures that every kind of test shares: one real RabbitMQ for the run, and a virtual host for each test.

A machine without RabbitMQ fails these tests. It never skips them.
"""

import base64
import secrets
import urllib.request
from collections.abc import Iterator

import pytest

from ops.private_broker import PrivateBroker


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    """The run's RabbitMQ. A test that stops or kills a broker starts one of its own."""
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def vhost(broker: PrivateBroker) -> Iterator[str]:
    """The AMQP URL of a fresh virtual host, which is deleted with all that is in it after the test."""
    name = f"test-{secrets.token_hex(6)}"
    _management(broker, "PUT", f"/api/vhosts/{name}")
    try:
        yield broker.amqp_url.removesuffix("%2F") + name
    finally:
        _management(broker, "DELETE", f"/api/vhosts/{name}")


def _management(broker: PrivateBroker, method: str, path: str) -> None:
    request = urllib.request.Request(f"{broker.management_url}{path}", method=method)
    request.add_header("Authorization", "Basic " + base64.b64encode(b"guest:guest").decode())
    with urllib.request.urlopen(request, timeout=30) as response:  # raises on any status from 400
        response.read()
