"""What the frames at a proxy say, as records of a history.

Owns following each connection's channels: which delivery an ack is for, which message a confirm is for, and whether
the manifest was on disk when an ack went by. Leaves out the frames' way through the proxy (`tests.proxy`) and what
follows from the records (`tests.checker`).
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pika.frame
import pika.spec

from tests.history import Acked, Confirmed, Delivered, HandedBack, Recorder, sha256_of, sha256_of_file, text_of
from tests.proxy import TO_BROKER, TO_CLIENT, Direction, Frame

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FLAG_HEADERS = 1 << 13


@dataclass(slots=True)
class _Content:
    """A method with content, while its header and body frames come in."""

    method: pika.spec.Basic.Deliver | pika.spec.Basic.Publish | pika.spec.Basic.Return
    size: int | None = None
    message_id: str | None = None
    body: bytes = b""


@dataclass(slots=True)
class _Channel:
    queues: dict[str, str] = field(default_factory=dict)  # by consumer tag
    without_acks: set[str] = field(default_factory=set)
    job_of: dict[int, str | None] = field(default_factory=dict)  # by delivery tag, of what is not settled yet
    contents: dict[Direction, _Content] = field(default_factory=dict)
    confirming: bool = False
    published: int = 0
    unconfirmed: dict[int, Confirmed] = field(default_factory=dict)
    returned: list[Confirmed] = field(default_factory=list)


class Tap:
    """Give `see` to a `Proxy` as its observer. What went wrong in here is kept in `fault`, and is no verdict."""

    def __init__(self, recorder: Recorder, output: Path) -> None:
        self._recorder = recorder
        self._output = output
        self._channels: dict[tuple[int, int], _Channel] = defaultdict(_Channel)
        self.fault: Exception | None = None

    def see(self, connection: int, direction: Direction, frame: Frame) -> None:
        """Takes in one frame. Called by the proxy's thread."""
        try:
            self._see(connection, direction, frame)
        except Exception as error:  # noqa: BLE001  the proxy must go on; the run that reads `fault` fails
            self.fault = self.fault or error

    def _see(self, connection: int, direction: Direction, frame: Frame) -> None:
        channel = self._channels[connection, frame.channel]
        match frame.raw[0]:
            case pika.spec.FRAME_METHOD:
                _, decoded = pika.frame.decode_frame(frame.raw)
                self._method(connection, frame.channel, channel, direction, decoded.method)
            case pika.spec.FRAME_HEADER if (content := channel.contents.get(direction)) is not None:
                content.size = int.from_bytes(frame.raw[11:19])
                content.message_id = _message_id(frame.raw[19:-1])
                self._complete(connection, frame.channel, channel, direction)
            case pika.spec.FRAME_BODY if (content := channel.contents.get(direction)) is not None:
                content.body += frame.raw[7:-1]
                self._complete(connection, frame.channel, channel, direction)
            case _:
                pass

    def _method(self, connection: int, number: int, channel: _Channel, direction: Direction, method: object) -> None:
        basic = pika.spec.Basic
        match method:
            case basic.Consume() if direction == TO_BROKER:
                channel.queues[method.consumer_tag] = method.queue
                if method.no_ack:
                    channel.without_acks.add(method.consumer_tag)
            case pika.spec.Confirm.Select():
                channel.confirming = True
            case basic.Deliver() | basic.Publish() | basic.Return():
                channel.contents[direction] = _Content(method)
            case basic.Ack() if direction == TO_BROKER:
                for tag in _tags(channel.job_of, method.delivery_tag, multiple=method.multiple):
                    manifest = self._manifest(channel.job_of.pop(tag))
                    self._recorder.add(
                        Acked(connection=connection, channel=number, delivery_tag=tag, manifest=manifest)
                    )
            case basic.Nack() | basic.Reject() if direction == TO_BROKER:
                for tag in _tags(channel.job_of, method.delivery_tag, multiple=getattr(method, "multiple", False)):
                    channel.job_of.pop(tag)
                    self._recorder.add(HandedBack(connection=connection, channel=number, delivery_tag=tag))
            case basic.Ack() if direction == TO_CLIENT:
                for tag in _tags(channel.unconfirmed, method.delivery_tag, multiple=method.multiple):
                    confirmed = channel.unconfirmed.pop(tag)
                    if confirmed in channel.returned:  # unroutable: the broker confirms it, and has it not
                        channel.returned.remove(confirmed)
                    else:
                        self._recorder.add(confirmed)
            case basic.Nack() if direction == TO_CLIENT:
                for tag in _tags(channel.unconfirmed, method.delivery_tag, multiple=method.multiple):
                    channel.unconfirmed.pop(tag)
            case _:
                pass

    def _complete(self, connection: int, number: int, channel: _Channel, direction: Direction) -> None:
        content = channel.contents[direction]
        if content.size is None or len(content.body) < content.size:
            return
        del channel.contents[direction]
        method, body = content.method, sha256_of(content.body)
        if isinstance(method, pika.spec.Basic.Deliver):
            if method.consumer_tag in channel.without_acks:
                return
            channel.job_of[method.delivery_tag] = _job_id(content)
            self._recorder.add(
                Delivered(
                    connection=connection,
                    channel=number,
                    delivery_tag=method.delivery_tag,
                    queue=channel.queues.get(method.consumer_tag, ""),
                    body=body,
                    message_id=content.message_id,
                    redelivered=method.redelivered,
                )
            )
            return
        sent = Confirmed(
            exchange=method.exchange, routing_key=method.routing_key, body=body, message_id=content.message_id
        )
        if isinstance(method, pika.spec.Basic.Return):
            channel.returned.append(sent)
        elif channel.confirming:
            channel.published += 1
            channel.unconfirmed[channel.published] = sent

    def _manifest(self, job_id: str | None) -> str | None:
        if job_id is None or not _PLAIN_NAME.fullmatch(job_id):
            return None
        return sha256_of_file(self._output / job_id / "manifest.json")


def _tags(known: Collection[int], tag: int, *, multiple: bool) -> list[int]:
    """The tags that an ack is for; tag 0 with `multiple` means all."""
    if not multiple:
        return [tag] if tag in known else []
    return sorted(each for each in known if each <= tag or tag == 0)


def _job_id(content: _Content) -> str | None:
    """Where to look for the manifest of a message; wrong guesses can only find none."""
    try:
        named = json.loads(content.body.decode())["job_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        named = None
    return named if isinstance(named, str) else content.message_id


def _message_id(properties: bytes) -> str | None:
    """The message_id out of encoded basic properties (AMQP 0-9-1, 4.2.6.1), whatever the headers hold."""
    flags, at = int.from_bytes(properties[:2]), 2

    def short() -> bytes:
        nonlocal at
        begin = at + 1
        at = begin + properties[at]
        return properties[begin:at]

    for bit in (15, 14):  # content_type, content_encoding
        if flags & 1 << bit:
            short()
    if flags & _FLAG_HEADERS:
        at += 4 + int.from_bytes(properties[at : at + 4])
    at += bool(flags & 1 << 12) + bool(flags & 1 << 11)  # delivery_mode, priority
    for bit in (10, 9, 8):  # correlation_id, reply_to, expiration
        if flags & 1 << bit:
            short()
    return text_of(short()) if flags & 1 << 7 else None
