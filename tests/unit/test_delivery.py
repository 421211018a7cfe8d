"""What a delivery's properties and headers mean, whatever is in them."""

import time
from types import SimpleNamespace
from typing import Any

import pika
import pytest

from daemon.delivery import Delivery, read_delivery

NOW = 1_796_000_000  # fixed: workers of one run must agree on the names of tests


def delivered(headers: dict[str, Any] | None = None, **properties: Any) -> Delivery:
    method = SimpleNamespace(delivery_tag=1, redelivered=False)
    return read_delivery(method, pika.BasicProperties(headers=headers, **properties), b"{}", generation=1)


def test_it_expires_by_its_copys_header_or_counted_from_when_it_was_published() -> None:
    assert delivered(expiration="60000", timestamp=NOW).expires_at == NOW + 60
    assert delivered({"x-reeld-expires-at": 1000 * NOW}, expiration="1").expires_at == NOW
    assert delivered(timestamp=NOW).expires_at is None
    assert delivered(timestamp=NOW).published_at == NOW


@pytest.mark.parametrize("timestamp", [NOW * 1000, NOW * 10**9, 2**63, 2**64 - 1])
def test_a_timestamp_that_is_not_in_seconds_is_none(timestamp: int) -> None:
    """Clients that count in milli- or nanoseconds are common; a copy's header could not even be sent with theirs."""
    delivery = delivered(expiration="60000", timestamp=timestamp)
    assert delivery.published_at is None
    assert delivery.expires_at is not None
    assert abs(delivery.expires_at - time.time() - 60) < 30


@pytest.mark.parametrize("expires_at", [2**63 - 1, -1, -(2**63), 10**30])
def test_an_expiry_that_is_no_time_is_none(expires_at: int) -> None:
    assert delivered({"x-reeld-expires-at": expires_at}).expires_at is None
    assert delivered(expiration=str(10**30 if expires_at < 0 else expires_at)).expires_at is None


def test_counts_that_a_publisher_made_up_can_still_be_counted_on() -> None:
    """What reeld puts on a copy is one more, and must fit into AMQP's 64 bits."""
    delivery = delivered(dict.fromkeys(("x-reeld-attempt", "x-reeld-lost", "x-delivery-count"), 2**63 - 1))
    for count in (delivery.attempt + 1, delivery.lost_count, delivery.delivery_count):
        assert 0 < count < 2**31
    none = delivered(dict.fromkeys(("x-reeld-attempt", "x-reeld-lost", "x-delivery-count"), "many"))
    assert (none.attempt, none.lost_count) == (1, 0)
