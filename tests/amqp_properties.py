"""AMQP properties as no well-behaved client would send them, byte by byte.

Owns the encoding of basic properties and field tables from raw bytes, because pika's own encoder refuses, or cannot
write, half of what RabbitMQ accepts. Strategies for Hypothesis draw them. Leaves out the bodies
(`tests.unit.job_bodies`).

Source of the format: https://www.rabbitmq.com/amqp-0-9-1-errata (field types) and AMQP 0-9-1, 4.2.6.1 (properties).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import pika
from hypothesis import strategies as st

from tests.history import text_of

# Name, bit of the flags, and whether the value is a short string (else its encoding is fixed below).
_PROPERTIES = {
    "content_type": 15,
    "content_encoding": 14,
    "headers": 13,
    "delivery_mode": 12,
    "priority": 11,
    "correlation_id": 10,
    "reply_to": 9,
    "expiration": 8,
    "message_id": 7,
    "timestamp": 6,
    "type": 5,
    "user_id": 4,
    "app_id": 3,
}


@dataclass(frozen=True)
class Properties:
    """Basic properties; strings are bytes, the table is encoded already (without its length)."""

    strings: Mapping[str, bytes] = field(default_factory=dict)
    headers: bytes | None = None
    delivery_mode: int | None = 2
    priority: int | None = None
    timestamp: int | None = None

    @property
    def message_id(self) -> str | None:
        """As the checker knows it."""
        raw = self.strings.get("message_id")
        return None if raw is None else text_of(raw)

    def encoded(self) -> bytes:
        flags, values = 0, b""
        for name, bit in _PROPERTIES.items():
            value = self._value(name)
            if value is not None:
                flags |= 1 << bit
                values += value
        return struct.pack(">H", flags) + values

    def for_pika(self) -> pika.BasicProperties:
        """Something that pika sends as it is."""
        return _Encoded(self.encoded())

    def _value(self, name: str) -> bytes | None:
        match name:
            case "headers":
                return None if self.headers is None else struct.pack(">I", len(self.headers)) + self.headers
            case "delivery_mode" | "priority":
                number = getattr(self, name)
                return None if number is None else struct.pack("B", number)
            case "timestamp":
                return None if self.timestamp is None else struct.pack(">Q", self.timestamp)
            case _:
                return None if name not in self.strings else short(self.strings[name])


class _Encoded(pika.BasicProperties):  # type: ignore[misc]
    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self._raw = raw

    def encode(self) -> list[bytes]:
        return [self._raw]


def short(text: bytes) -> bytes:
    return struct.pack("B", len(text)) + text


def long_string(text: bytes) -> bytes:
    return b"S" + struct.pack(">I", len(text)) + text


def array(*values: bytes) -> bytes:
    joined = b"".join(values)
    return b"A" + struct.pack(">I", len(joined)) + joined


def table(entries: Mapping[bytes, bytes]) -> bytes:
    """A table's content, without its length."""
    return b"".join(short(key) + value for key, value in entries.items())


def table_value(entries: Mapping[bytes, bytes]) -> bytes:
    """A table as a field's value."""
    content = table(entries)
    return b"F" + struct.pack(">I", len(content)) + content


def nested(depth: int, *, arrays: bool) -> bytes:
    """A value that holds a value, `depth` times."""
    value = b"V"
    for _ in range(depth):
        value = array(value) if arrays else table_value({b"": value})
    return value


def _number(kind: bytes, form: str, low: int, high: int) -> st.SearchStrategy[bytes]:
    return st.integers(low, high).map(lambda value: kind + struct.pack(form, value))


SMALL_BYTES = st.binary(max_size=12) | st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass"))
_SCALARS = st.one_of(
    SMALL_BYTES.map(long_string),
    st.sampled_from([b"V", b"t\0", b"t\1", b"t\7"]),
    _number(b"b", ">b", -128, 127),
    _number(b"B", ">B", 0, 255),
    _number(b"s", ">h", -(2**15), 2**15 - 1),
    _number(b"u", ">H", 0, 2**16 - 1),
    _number(b"I", ">i", -(2**31), 2**31 - 1),
    _number(b"i", ">I", 0, 2**32 - 1),
    _number(b"l", ">q", -(2**63), 2**63 - 1),
    _number(b"T", ">Q", 0, 2**64 - 1),
    st.tuples(st.integers(0, 255), st.integers(-(2**31), 2**31 - 1)).map(lambda v: b"D" + struct.pack(">Bi", *v)),
    st.floats().map(lambda value: b"d" + struct.pack(">d", value)),
    st.floats(width=32).map(lambda value: b"f" + struct.pack(">f", value)),
    st.binary(max_size=12).map(lambda raw: b"x" + struct.pack(">I", len(raw)) + raw),
)
_KEYS = st.sampled_from(
    [b"traceparent", b"x-death", b"x-reeld-attempt", b"x-reeld-code", b"x-delivery-count", b"x-first-death-queue",
     b"content-type", b"", b"\xff\xfe", b"k" * 255]
) | SMALL_BYTES  # fmt: skip
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda values: array(*values)),
        st.dictionaries(_KEYS, inner, max_size=3).map(table_value),
    ),
    max_leaves=6,
)
_ODD_VALUES = st.one_of(
    st.builds(nested, st.sampled_from([30, 300, 2_000, 9_000]), arrays=st.booleans()),
    st.sampled_from([b"x", "ä".encode(), "\U0001f98a".encode(), b"\xff"]).flatmap(
        lambda piece: st.integers(1, 128_000 // len(piece)).map(lambda count: long_string(piece * count))
    ),
)
HEADERS = st.dictionaries(_KEYS, _VALUES, max_size=5).map(table) | st.builds(
    lambda key, value: table({key: value}), SMALL_BYTES, _ODD_VALUES
)
_ANY_STRING = st.binary(max_size=255) | st.text(max_size=60).map(lambda text: text.encode()[:255])
_IDS = st.sampled_from([b"job-7", b"", b"../x", b"a b", b"a" * 128, b"a" * 129, b"\xff", b"worker.x", b"#"])


@st.composite
def properties(draw: st.DrawFn) -> Properties:
    """Any properties that AMQP can carry. `user_id` is left out: the broker itself refuses another user's."""
    chosen = draw(st.sets(st.sampled_from(["content_type", "content_encoding", "correlation_id", "type", "app_id"])))
    strings = {name: draw(_ANY_STRING) for name in sorted(chosen)}
    if draw(st.booleans()):
        strings["message_id"] = draw(_IDS | _ANY_STRING)
    if draw(st.booleans()):
        strings["reply_to"] = draw(st.sampled_from([b"nobody", b"amq.rabbitmq.reply-to.x", b"\xff"]) | _ANY_STRING)
    if draw(st.integers(0, 9)) == 0:
        # Long ones: an expired message is the broker's to dead-letter. The broker itself refuses what is no number.
        strings["expiration"] = draw(st.sampled_from([b"600000", b"4294967295", b"-1", b"soon", b"\xff"]))
    return Properties(
        strings=strings,
        headers=draw(st.none() | HEADERS),
        delivery_mode=draw(st.sampled_from([2] * 12 + [None, 1] * 4 + [0])),
        priority=draw(st.none() | st.integers(0, 255)),
        timestamp=draw(st.none() | st.integers(0, 2**64 - 1)),
    )
