"""Who this worker's process is, and noticing another one that calls itself by the same `worker_id`.

Boxes made from one image have one name, and two workers on a box have its name both. Neither loses a job by it, but
`reeld top` then shows two workers as one, and a drain stops both. Leaves out how heartbeats come here
(`daemon.consumer`) and what else they say (`daemon.rank`).
"""

import math
import os
import socket
import threading
import time
import uuid

import structlog

from daemon.client import parse_event
from daemon.events import heartbeat_key, now

log = structlog.get_logger("process")

_REPEAT_SECONDS = 300.0


class Presence:
    """This process among those that say its worker's id. For any thread."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._begun = now()  # of the same resolution as an event's
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()
        self.identity = {"instance": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        """What each heartbeat of this process says of it."""

    def hear(self, body: bytes) -> None:
        """Takes a heartbeat that came under this worker's id, and warns of each other process every few minutes.

        What was sent before this process began is of the one that it replaced. Never raises.
        """
        event = parse_event(heartbeat_key(self._worker_id), body)
        other = event.data.get("instance")  # a worker of a version before did not say
        # Both times are in UTC and of one length, so that they sort.
        if not isinstance(other, str) or other == self.identity["instance"] or event.time < self._begun:
            return
        at = time.monotonic()
        with self._lock:
            if at - self._told.get(other, -math.inf) < _REPEAT_SECONDS:
                return
            self._told = {each: told for each, told in self._told.items() if at - told < _REPEAT_SECONDS}
            self._told[other] = at
        log.warning(
            "worker_id_shared",
            worker_id=self._worker_id,
            other_host=event.data.get("host"),
            other_pid=event.data.get("pid"),
            consequence="`reeld top` shows both as one, and `reeld drain` stops both: set worker_id in one of them",
        )
