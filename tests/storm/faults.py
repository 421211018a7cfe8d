"""How each kind of fault is done, and undone.

Owns doing them one at a time. Leaves out when (`tests.storm.schedule`) and the means (`tests.proxy`, `tests.node`,
`tests.storm.fleet`).
"""

import contextlib
import signal
import uuid
from collections.abc import Callable

import psutil

from tests.history import Fault, Recorder
from tests.node import Node
from tests.proxy import TO_BROKER, TO_CLIENT, Catch, Proxy
from tests.storm.fleet import Daemon
from tests.storm.schedule import FAULT_KINDS, StormFault

_CATCH_SECONDS = 15.0
_NOTICED_SECONDS = 180.0


class Faults:
    """Does faults to a running storm. `wait(seconds, until)` lets time pass while the daemons are kept running."""

    def __init__(
        self,
        node: Node,
        proxy: Proxy,
        daemons: list[Daemon],
        recorder: Recorder,
        *,
        cancel: Callable[[str], None],
        wait: Callable[[float, Callable[[], bool]], None],
    ) -> None:
        self._node, self._proxy, self._daemons, self._recorder = node, proxy, daemons, recorder
        self._cancel, self._wait = cancel, wait
        self.unnoticed: list[str] = []  # what a daemon should have noticed by itself

    def do(self, fault: StormFault) -> str:
        """Does one fault, waits as long as it lasts, and undoes it. Returns what it met; empty when it met nothing.

        A daemon that is just being started has nothing that a fault could meet: then it is the next one's.
        """
        first = fault.daemon % len(self._daemons)
        for daemon in [*self._daemons[first:], *self._daemons[:first]]:
            if met := self._do(fault, daemon):
                break
        self._recorder.add(Fault(what=fault.kind, detail=met))
        return met

    def _do(self, fault: StormFault, daemon: Daemon) -> str:
        proxy, node = self._proxy, self._node
        match fault.kind:
            case "reset all connections":
                return _some(proxy.reset(), "connections")
            case "reset the consumer":
                return _some(proxy.reset(f"{daemon.worker_id} consumer"), "connections")
            case "reset the publisher":
                return _some(proxy.reset(f"{daemon.worker_id} publisher"), "connections")
            case "reset at the ack":
                return self._reset_at(proxy.hold("Basic.Ack", TO_BROKER))
            case "reset at a confirm":
                return self._reset_at(proxy.hold("Basic.Ack", TO_CLIENT))
            case "stall":
                return self._for_a_while(fault, proxy.stall, proxy.heal)
            case "drip":
                return self._for_a_while(fault, lambda: proxy.drip(200, every_seconds=0.05), proxy.heal)
            case "black hole":
                return self._for_a_while(fault, proxy.black_hole, proxy.heal)
            case "refuse connections":

                def refuse() -> None:
                    proxy.refuse()
                    proxy.reset()

                return self._for_a_while(fault, refuse, proxy.heal)
            case "broker closes all connections":
                return self._close_connections()
            case "broker paused":
                return self._for_a_while(fault, node.pause, node.resume)
            case "memory alarm":
                return self._for_a_while(fault, node.raise_memory_alarm, node.clear_memory_alarm)
            case "broker restarted":
                node.restart()
                return "the broker"
            case "broker killed":
                node.restart(kill=True)
                return "the broker"
            case "rank 0 stopped for a while":
                return self._stopped(fault, daemon.rank(0))
            case "peer stopped for a while":
                return self._stopped(fault, daemon.rank(daemon.ranks - 1))
            case "rank 0 stopped for good":
                return self._stopped_for_good(daemon.rank(0))
            case "peer stopped for good":
                return self._stopped_for_good(daemon.rank(daemon.ranks - 1))
            case "rank 0 killed":
                return _killed(daemon.rank(0))
            case "peer killed":
                return _killed(daemon.rank(daemon.ranks - 1))
            case "fork server killed":
                return _killed(daemon.fork_server())
            case "launcher killed":
                return daemon.worker_id if daemon.signal_launcher(signal.SIGKILL) else ""
            case "drained":
                return daemon.worker_id if daemon.signal_launcher(signal.SIGTERM) else ""
            case "drained twice":
                first = daemon.signal_launcher(signal.SIGTERM)
                self._wait(fault.seconds, lambda: False)
                return daemon.worker_id if first and daemon.signal_launcher(signal.SIGTERM) else ""
            case "unknown job cancelled":
                self._cancel(f"unknown-{uuid.UUID(int=fault.after_jobs)}")
                return "nobody"
            case _:
                raise AssertionError(f"{fault.kind} is not among {list(FAULT_KINDS)}")

    def _for_a_while(self, fault: StormFault, begin: Callable[[], None], end: Callable[[], None]) -> str:
        begin()
        try:
            self._wait(fault.seconds, lambda: False)
        finally:
            end()
        return f"for {fault.seconds} s"

    def _reset_at(self, catch: Catch) -> str:
        self._wait(_CATCH_SECONDS, catch.caught.is_set)
        met = catch.caught.is_set()
        self._proxy.reset()
        self._proxy.release(catch)
        return "a frame on its way" if met else ""

    def _close_connections(self) -> str:
        names = [each["name"] for each in self._node.api("GET", "/connections")]
        for name in names:
            with contextlib.suppress(OSError):  # it may have gone by itself
                self._node.api("DELETE", f"/connections/{_quoted(name)}")
        return _some(len(names), "connections")

    def _stopped(self, fault: StormFault, process: psutil.Process | None) -> str:
        if process is None:
            return ""
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
        self._wait(fault.seconds, lambda: False)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
        return f"process {process.pid} for {fault.seconds} s"

    def _stopped_for_good(self, process: psutil.Process | None) -> str:
        """Until the daemon itself has noticed, and ended it."""
        if process is None:
            return ""
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
            self._wait(_NOTICED_SECONDS, lambda: not process.is_running())
            if process.is_running():
                process.resume()
                self.unnoticed.append(f"process {process.pid} was stopped for {_NOTICED_SECONDS:g} s")
        return f"process {process.pid}"


def _killed(process: psutil.Process | None) -> str:
    if process is None:
        return ""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    return f"process {process.pid}"


def _some(count: int, what: str) -> str:
    return f"{count} {what}" if count else ""


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")
