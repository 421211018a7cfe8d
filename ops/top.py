"""`reeld top`: all daemons, ranks, jobs and queues on one live screen.

Everything comes from the status exchange; only the queues' depths are asked of the broker, passively and over the same
connection, because no event tells how many jobs wait. Owns the loop, the keyboard and reconnecting. Leaves out what
is remembered of the events (`ops.fleet`) and how it looks (`ops.top_frame`).
"""

import contextlib
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from daemon.client import EventStream
from daemon.errors import BrokerUnavailableError
from daemon.sections import BrokerConfig
from ops.failure import CommandFailedError
from ops.fleet import Fleet, hear
from ops.top_frame import Depths, document, frame, lines

_FIRST_SECONDS = 15.0
_REDRAW_SECONDS = 0.5
_COUNT_SECONDS = 2.0
_PLAIN_SECONDS = 5.0


def once(broker: BrokerConfig, *, as_json: bool, svg: Path | None = None, timeout_seconds: float | None = None) -> None:
    """Prints one frame, once every worker had the time to be heard.

    Raises CommandFailedError when none was in `timeout_seconds`.
    """
    fleet = Fleet()
    seconds = timeout_seconds or _FIRST_SECONDS
    with EventStream(broker, ["#"]) as stream:
        hear(stream, fleet, timeout_seconds=seconds)
        depths = _depths(stream, broker, fleet)
    if not fleet.workers:
        raise CommandFailedError(f"no worker was heard in {seconds:g} s")
    if as_json:
        print(json.dumps(document(fleet, depths, time.monotonic()), indent=2, ensure_ascii=False))
        return
    console = Console(record=svg is not None)
    console.print(frame(fleet, depths, time.monotonic()))
    if svg is not None:
        svg.write_text(console.export_svg(title="reeld top"), encoding="utf-8")


def live(broker: BrokerConfig) -> None:
    """The live screen, until q or Ctrl-C; without a terminal a line a worker every few seconds."""
    console = Console()
    fleet = Fleet()
    # The first connection may fail; later ones are tried again.
    stream = EventStream(broker, ["#"])
    with contextlib.suppress(KeyboardInterrupt), _ended_by_sigterm():
        if console.is_terminal and sys.stdin.isatty():
            with _keys() as quits, Live(console=console, screen=True, auto_refresh=False) as screen:
                for depths, notice in _listen(broker, stream, fleet, _REDRAW_SECONDS):
                    height = max(5, console.height - 1)
                    shown = frame(fleet, depths, time.monotonic(), notice=notice, live=True)
                    screen.update(_cut(shown, console, height), refresh=True)
                    if quits():
                        return
        else:
            for depths, notice in _listen(broker, stream, fleet, _PLAIN_SECONDS):
                for line in lines(fleet, depths, time.monotonic(), notice=notice):
                    print(line, flush=True)


def _listen(
    broker: BrokerConfig, stream: EventStream, fleet: Fleet, every_seconds: float
) -> Iterator[tuple[Depths, str | None]]:
    """Takes events in, and yields every so often. A broker that is away is tried again for ever."""
    depths: Depths = {}
    connected: EventStream | None = stream
    notice: str | None = None
    counted_at = 0.0
    try:
        while True:
            end = time.monotonic() + every_seconds
            try:
                if connected is None:
                    connected, notice = EventStream(broker, ["#"]), None
                while (left := end - time.monotonic()) > 0:
                    event = connected.next(left)
                    if event is not None:
                        fleet.take(event, now=time.monotonic())
                if time.monotonic() - counted_at > _COUNT_SECONDS:
                    depths, counted_at = _depths(connected, broker, fleet), time.monotonic()
            except BrokerUnavailableError as error:
                if connected is not None:
                    connected.close()
                connected, notice = None, f"{error}; trying again"
                time.sleep(max(0.0, end - time.monotonic()))
            yield depths, notice
    finally:
        if connected is not None:
            connected.close()


def _depths(stream: EventStream, broker: BrokerConfig, fleet: Fleet) -> Depths:
    """How many messages wait for each pool, and among its dead letters."""
    queues = {pool: f"{broker.prefix}.jobs.{pool}" for pool in fleet.pools}
    return {
        pool: {"waiting": stream.count(name), "dead": stream.count(f"{name}.dead")} for pool, name in queues.items()
    }


def _cut(shown: RenderableType, console: Console, height: int) -> RenderableType:
    """The first `height` lines: what is longer than the screen would scroll it."""
    rows = console.render_lines(shown, console.options.update(height=None), pad=False)
    text = Text()
    for row in rows[:height]:
        for segment in row:
            text.append(segment.text, style=segment.style)
        text.append("\n")
    return text


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Reads single keys meanwhile; yields what says whether q was pressed. The terminal is put back afterwards."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)

    def quits() -> bool:
        while select.select([descriptor], [], [], 0)[0]:
            pressed = os.read(descriptor, 64)
            if not pressed or b"q" in pressed.lower():
                return True
        return False

    try:
        yield quits
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM and SIGHUP leave like Ctrl-C, or they would leave the terminal without its echo."""

    def leave(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
