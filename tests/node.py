"""A RabbitMQ node that belongs to one test, and what can happen to a broker.

Owns the faults of the broker itself: stopped, killed, paused, alarmed, started again with its data, and its
connections closed from the inside. Leaves out how a node is started (`ops.private_broker`) and the network
between (`tests.proxy`).
"""

import base64
import json
import os
import signal
import time
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from ops.private_broker import PrivateBroker
from tests.brokers import enter_root

# A killed node loses a quorum queue that was declared within about the last second (seen on 3.10, 4.0 and 4.3).
DECLARED_SECONDS = 3  # a disk under load


def api(broker: PrivateBroker, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """A call of the management API under `/api`; raises `urllib.error.HTTPError` from status 400 on."""
    request = urllib.request.Request(f"{broker.management_url}/api{path}", method=method)
    request.add_header("Authorization", "Basic " + base64.b64encode(b"guest:guest").decode())
    request.add_header("Content-Type", "application/json")
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(request, data=data, timeout=30) as response:
        content = response.read()
    return json.loads(content) if content else None


class Node(PrivateBroker):
    """A private node with the faults of faults.md. Its timeouts are looked at every second, not every minute."""

    def __init__(self, folder: Path, *, config: str = "") -> None:
        advanced = "[{rabbit,[{channel_tick_interval,1000}]}].\n"
        super().__init__(folder, config=config, advanced=advanced, enter=enter_root())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid is not None:
            self.kill()  # a stop takes seconds, and its data is worth nothing now
        self.stop()

    def pause(self) -> None:
        """SIGSTOP: the node is there and answers nothing, its sockets stay open."""
        os.kill(self._running_pid(), signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._running_pid(), signal.SIGCONT)

    def restart(self, *, kill: bool = False) -> None:
        """Stops (or kills) the node and starts it again with its data, on the same port."""
        if kill:
            self.kill()
        else:
            self.stop()
        self.start()

    def settle_declared(self) -> None:
        """Waits until queues declared just now outlive a kill; no event says so."""
        time.sleep(DECLARED_SECONDS)

    def set_consumer_timeout(self, *, seconds: float) -> None:
        """`consumer_timeout` of the channels that are opened from here on."""
        self.ctl("eval", f"application:set_env(rabbit, consumer_timeout, {round(seconds * 1000)}).")

    def raise_memory_alarm(self) -> None:
        """Every publishing connection is blocked from here on, until `clear_memory_alarm`."""
        self.ctl("set_vm_memory_high_watermark", "0.00000001")

    def clear_memory_alarm(self) -> None:
        self.ctl("set_vm_memory_high_watermark", "0.4")

    def api(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return api(self, method, path, body)

    def delete_queue(self, name: str) -> None:
        self.api("DELETE", f"/queues/%2F/{urllib.parse.quote(name, safe='')}")

    def _running_pid(self) -> int:
        assert self.pid is not None, "the node is not running"
        return self.pid
