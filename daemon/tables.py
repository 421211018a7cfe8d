"""AMQP field tables, read so that no publisher's headers can break the connection that they arrive on.

Owns reading header tables in pika's place. pika 1.4 raises out of its I/O loop, which ends the connection, on a
timestamp past the year 9999, on a float that is no number, and on deep nesting; it cuts floats down to integers, and
can write neither them nor what it read of some others. A message with such a header would be redelivered, end the
next connection as well, and be dead-lettered by the broker without a word to its publisher.

Everything read here can be written by pika again. Leaves out the properties other than headers (`daemon.consumer`).
"""

import struct
from datetime import UTC, datetime
from typing import Any

import pika.data

_MAX_DEPTH = 16


def install() -> None:
    """Has pika read tables with `decode_table`, from now on and in the whole process."""
    pika.data.decode_table = decode_table


def decode_table(encoded: bytes, offset: int) -> tuple[dict[str, Any], int]:
    """Reads the table at `offset`. Returns it and the offset behind it.

    Names that are no UTF-8 are left out with their values. Floats, and timestamps that no calendar has, become text;
    what is nested too deep becomes None.
    """
    return _table(encoded, offset, 0)


def _table(encoded: bytes, offset: int, depth: int) -> tuple[dict[str, Any], int]:
    end = offset + 4 + _length(encoded, offset)
    offset += 4
    found: dict[str, Any] = {}
    while offset < end:
        name, offset = pika.data.decode_short_string(encoded, offset)
        value, offset = _value(encoded, offset, depth + 1)
        if isinstance(name, str):
            found[name] = value
    return found, end


def _value(encoded: bytes, offset: int, depth: int) -> tuple[Any, int]:
    kind, at = encoded[offset : offset + 1], offset + 1
    match kind:
        case b"F" | b"A" if depth >= _MAX_DEPTH:
            return None, at + 4 + _length(encoded, at)
        case b"F":
            return _table(encoded, at, depth)
        case b"A":
            end = at + 4 + _length(encoded, at)
            at += 4
            values = []
            while at < end:
                value, at = _value(encoded, at, depth + 1)
                values.append(value)
            return values, end
        case b"T":
            (seconds,) = struct.unpack_from(">Q", encoded, at)
            try:
                return datetime.fromtimestamp(seconds, UTC), at + 8
            except (ValueError, OverflowError, OSError):
                return str(seconds), at + 8
        case b"d":
            return repr(struct.unpack_from(">d", encoded, at)[0]), at + 8
        case b"f":
            return repr(struct.unpack_from(">f", encoded, at)[0]), at + 4
        case _:
            scalar: tuple[Any, int] = pika.data.decode_value(encoded, offset)
            return scalar


def _length(encoded: bytes, offset: int) -> int:
    length: int = struct.unpack_from(">I", encoded, offset)[0]
    return length
