"""A TCP proxy on loopback that a test can make misbehave, and that knows where AMQP's frames begin.

Owns the ways in which a network fails: connections that are reset, stall, drip, vanish in a black hole or are
refused, and single AMQP 0-9-1 frames that are held back or lost on their way. Bytes that are not AMQP (TLS,
HTTP) go through as they are, so it serves any client. Leaves out the broker behind it (`tests.node`).

    with Proxy(broker.amqp_port) as proxy:
        worker = start(url=proxy.through(broker.amqp_url))
        held = proxy.hold("Basic.Ack", TO_BROKER)   # the worker's next ack gets this far and no further
        held.wait()
        proxy.reset()
"""

import asyncio
import concurrent.futures
import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import pika.spec

_T = TypeVar("_T")

Direction = Literal["to_broker", "to_client"]
TO_BROKER: Direction = "to_broker"
TO_CLIENT: Direction = "to_client"

_LOOPBACK = "127.0.0.1"
_HEADER = b"AMQP"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close() sends RST, not FIN


@dataclass(frozen=True, slots=True)
class Frame:
    """One AMQP 0-9-1 frame: the octets type, channel (2), size (4), payload, 0xCE (specification, 4.2.3)."""

    raw: bytes

    @property
    def channel(self) -> int:
        return int.from_bytes(self.raw[1:3])

    @property
    def method(self) -> str | None:
        """The method's name as the specification spells it (`Basic.Ack`); None for headers, bodies, heartbeats."""
        if self.raw[0] != pika.spec.FRAME_METHOD:
            return None
        known = pika.spec.methods.get(int.from_bytes(self.raw[7:11]))
        return None if known is None else str(known.NAME)


class Catch:
    """A frame that is waited for, and then held back or lost."""

    def __init__(self, matches: Callable[[Frame], bool], direction: Direction, *, lose: bool, times: int) -> None:
        self.matches, self.direction, self.lose = matches, direction, lose
        self.left = times
        self.frames: list[Frame] = []
        self.caught = threading.Event()
        self.released = asyncio.Event()

    def wait(self, timeout: float = 120) -> Frame:
        """The first frame that was caught. Fails when none comes."""
        assert self.caught.wait(timeout), f"no such frame in {timeout} s"
        return self.frames[0]


@dataclass(eq=False)
class _Link:
    """One connection of a client, and ours to the broker for it."""

    client: asyncio.StreamWriter
    broker: asyncio.StreamWriter
    number: int = 0
    name: str = ""
    amqp: bool = True
    damaged: bool = False
    pumps: list["asyncio.Task[None]"] = field(default_factory=list)

    def reset(self) -> None:
        for writer in (self.client, self.broker):
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()
        for pump in self.pumps:
            pump.cancel()


class Proxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target_port`, from a thread of its own.

    A fault stays until `heal()`, and applies to the connections there are and to those to come. `observe` sees every
    frame as it comes, before any fault and before it is passed on, with the number of its connection; it must be quick.
    `listening` is a socket to listen on instead: it may belong to another network namespace.
    """

    def __init__(
        self,
        target_port: int,
        *,
        observe: Callable[[int, Direction, Frame], None] | None = None,
        listening: socket.socket | None = None,
    ) -> None:
        self.port = 0
        self._listening = listening
        self._observe = observe
        self._numbers = itertools.count(1)
        self._target_port = target_port
        self._links: list[_Link] = []
        self._catches: list[Catch] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._swallowing = False
        self._drip: tuple[int, float] | None = None
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def through(self, url: str) -> str:
        """`url` with this proxy's address in place of the broker's."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}{_LOOPBACK}:{self.port}"))

    # Faults

    def reset(self, name: str = "") -> int:
        """Resets (RST, to both sides) every connection whose client name contains `name`; returns how many."""

        def reset() -> int:
            chosen = [link for link in self._links if name in link.name]
            for link in chosen:
                link.reset()
            return len(chosen)

        return self._on_loop(reset)

    def stall(self) -> None:
        """Reads no more: bytes wait in buffers, which fill up. They arrive after `heal()`."""
        self._on_loop(self._flowing.clear)

    def black_hole(self) -> None:
        """Swallows every byte and every close, in both directions; all sockets stay open and nothing is answered."""

        def swallow() -> None:
            self._swallowing = True

        self._on_loop(swallow)

    def drip(self, size: int, *, every_seconds: float) -> None:
        """Passes on `size` bytes at a time with a pause after each."""

        def drip() -> None:
            self._drip = (size, every_seconds)

        self._on_loop(drip)

    def refuse(self) -> None:
        """Refuses new connections; those there are go on."""

        def refuse() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None

        self._on_loop(refuse)

    def hold(
        self, method: str, direction: Direction, *, matches: Callable[[Frame], bool] = lambda _frame: True
    ) -> Catch:
        """Holds back the next such frame, and all that follow it on its connection in that direction, until
        `release()`, or for good when the connection is reset meanwhile."""
        return self._catch(method, direction, matches, lose=False, times=1)

    def lose(
        self,
        method: str,
        direction: Direction,
        *,
        times: int = 1,
        matches: Callable[[Frame], bool] = lambda _frame: True,
    ) -> Catch:
        """Loses the next `times` such frames; all others pass."""
        return self._catch(method, direction, matches, lose=True, times=times)

    def release(self, catch: Catch) -> None:
        """Lets a held frame go, and forgets a catch that has caught nothing yet."""

        def release() -> None:
            catch.left = 0
            catch.released.set()

        self._on_loop(release)

    def heal(self) -> None:
        """Ends every fault. Connections that lost bytes are reset: nobody can read on after a gap."""

        def heal() -> None:
            self._swallowing, self._drip = False, None
            self._flowing.set()
            for catch in self._catches:
                catch.left = 0
                catch.released.set()
            self._catches.clear()
            for link in self._links:
                if link.damaged:
                    link.reset()

        self._on_loop(heal)
        self._run(self._listen())

    def names(self) -> list[str]:
        """The client names of the connections that neither side has closed, in the order in which they came."""
        return self._on_loop(lambda: [link.name for link in self._links if not any(pump.done() for pump in link.pumps)])

    # Life

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> None:
        if self._server is None:
            if self._listening is not None:
                self._server = await asyncio.start_server(self._on_client, sock=self._listening)
            else:
                self._server = await asyncio.start_server(self._on_client, _LOOPBACK, self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for link in list(self._links):
            link.reset()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_loop(self, call: Callable[[], _T]) -> _T:
        async def run() -> _T:
            return call()

        result: _T = self._run(run())
        return result

    def _run(self, coroutine: Any) -> Any:
        future: concurrent.futures.Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(timeout=30)

    # The way of a byte

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            broker_reader, broker_writer = await asyncio.open_connection(_LOOPBACK, self._target_port)
        except OSError:
            # Only now is it known that nobody is behind us: the nearest thing to "connection refused".
            _Link(writer, writer).reset()
            return
        link = _Link(writer, broker_writer, next(self._numbers))
        self._links.append(link)
        link.pumps = [
            asyncio.ensure_future(self._pump(link, reader, broker_writer, TO_BROKER)),
            asyncio.ensure_future(self._pump(link, broker_reader, writer, TO_CLIENT)),
        ]
        await asyncio.gather(*link.pumps, return_exceptions=True)
        self._links.remove(link)
        link.reset()

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        splitter = _Splitter(link, begins_with_header=direction == TO_BROKER)
        try:
            while data := await reader.read(65536):
                await self._flowing.wait()
                for piece in splitter.feed(data):
                    if isinstance(piece, Frame) and self._observe is not None:
                        self._observe(link.number, direction, piece)
                    if isinstance(piece, Frame) and await self._caught(piece, direction):
                        continue
                    await self._forward(link, piece.raw if isinstance(piece, Frame) else piece, writer)
            await self._flowing.wait()
            await self._swallow_close(link)
            writer.write_eof()
        except OSError:
            await self._swallow_close(link)
            link.reset()

    async def _swallow_close(self, link: _Link) -> None:
        if self._swallowing:
            link.damaged = True
            await asyncio.Event().wait()  # the other side must not see the close either; `heal` ends this

    async def _caught(self, frame: Frame, direction: Direction) -> bool:
        """Whether the frame is lost. One that is held comes back from here only when it is released."""
        for catch in self._catches:
            if catch.left > 0 and catch.direction == direction and catch.matches(frame):
                catch.left -= 1
                catch.frames.append(frame)
                catch.caught.set()
                if catch.lose:
                    return True
                await catch.released.wait()
        return False

    async def _forward(self, link: _Link, data: bytes, writer: asyncio.StreamWriter) -> None:
        while data:
            if self._swallowing:
                link.damaged = True
                return
            size, pause = self._drip or (len(data), 0.0)
            writer.write(data[:size])
            await writer.drain()
            data = data[size:]
            if pause:
                await asyncio.sleep(pause)

    def _catch(
        self, method: str, direction: Direction, matches: Callable[[Frame], bool], *, lose: bool, times: int
    ) -> Catch:
        assert any(method == known.NAME for known in pika.spec.methods.values()), f"AMQP has no method {method}"

        def holds(frame: Frame) -> bool:
            return frame.method == method and matches(frame)

        catch = Catch(holds, direction, lose=lose, times=times)
        self._on_loop(lambda: self._catches.append(catch))
        return catch


class _Splitter:
    """Cuts one direction of a link into frames, or passes its bytes on when they are not AMQP."""

    def __init__(self, link: _Link, *, begins_with_header: bool) -> None:
        self._link = link
        self._rest = b""
        self._header_due = begins_with_header

    def feed(self, data: bytes) -> Iterator[Frame | bytes]:
        self._rest += data
        if self._header_due:
            if len(self._rest) < 8:
                return
            self._header_due = False
            self._link.amqp = self._rest.startswith(_HEADER)
            if self._link.amqp:
                yield self._cut(8)
        if not self._link.amqp:
            if self._rest:
                yield self._cut(len(self._rest))
            return
        while len(self._rest) >= 7 and len(self._rest) >= (size := int.from_bytes(self._rest[3:7]) + 8):
            frame = Frame(self._cut(size))
            if frame.method == "Connection.StartOk":
                self._link.name = _connection_name(frame.raw)
            yield frame

    def _cut(self, size: int) -> bytes:
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def _connection_name(start_ok: bytes) -> str:
    """The client property `connection_name` (a field table's entry: name, 'S', length (4), text)."""
    _, found, rest = start_ok.partition(b"\x0fconnection_nameS")
    return rest[4 : 4 + int.from_bytes(rest[:4])].decode() if found else ""
