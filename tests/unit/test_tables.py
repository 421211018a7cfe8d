"""Header tables: whatever RabbitMQ can send is read, and what was read can be sent again."""

import struct
from datetime import UTC, datetime
from typing import Any

import pika.data
import pytest
from hypothesis import example, given, settings

import daemon.connection  # noqa: F401  installs the reader for all of pika
from daemon.tables import decode_table
from tests.amqp_properties import HEADERS, array, long_string, nested, table


def read(content: bytes) -> dict[str, Any]:
    encoded = struct.pack(">I", len(content)) + content
    found, end = decode_table(encoded, 0)
    assert end == len(encoded)
    return found


@given(HEADERS)
@settings(max_examples=300, deadline=None)
@example(table({b"a": b"T" + b"\xff" * 8, b"b": b"l" + b"\x80" + b"\0" * 7}))
@example(table({b"a": nested(20_000, arrays=True)}))
@example(table({b"a": nested(20_000, arrays=False)}))
def test_every_table_is_read_and_can_be_written_again(content: bytes) -> None:
    """No table raises, and pika writes what was read: a dead letter can carry its publisher's headers."""
    pieces: list[bytes] = []
    size = pika.data.encode_table(pieces, read(content))
    assert size == sum(map(len, pieces))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"T" + struct.pack(">Q", 1), datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)),
        (b"T" + struct.pack(">Q", 2**63), str(2**63)),
        (b"d" + struct.pack(">d", 1.5), "1.5"),
        (b"d" + struct.pack(">d", float("nan")), "nan"),
        (b"f" + struct.pack(">f", float("inf")), "inf"),
        (b"I" + struct.pack(">i", -3), -3),
        (long_string("ä".encode()), "ä"),
        (long_string(b"\xff"), b"\xff"),
        (array(b"t\1", array(b"V")), [True, [None]]),
        (nested(2, arrays=False), {"": {"": None}}),
    ],
)
def test_values_are_what_they_were(value: bytes, expected: Any) -> None:
    """Values arrive as they are, but for floats and dates without a calendar, which become text."""
    assert read(table({b"name": value})) == {"name": expected}


def test_what_is_left_out_does_not_take_its_neighbours_along() -> None:
    """A name that is no UTF-8 and a bottomless value go; what stands behind them is read."""
    found = read(table({b"\xff": b"V", b"deep": nested(1000, arrays=True), b"last": b"t\1"}))
    assert found.keys() == {"deep", "last"}
    assert found["last"] is True


def test_pika_uses_this_reader() -> None:
    """The properties of a delivery are read by it."""
    assert pika.data.decode_table is decode_table
