"""Who this worker's process is, and noticing another one that calls itself by the same `worker_id`.

Boxes made from one image have one name, and two workers on a box have its name both. Neither loses a job by it, but
`reeld top` then shows two workers as one, and a drain stops both. Leaves out how heartbeats come here
(`daemon.consumer`) and what else they say (`daemon.rank`).
"""

import json
import math
import os
import socket
import threading
import time
import uuid
from typing import Any

import structlog

from daemon.events import now

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
        said = _read(body)
        if said is None or said["instance"] == self.identity["instance"] or said["sent_at"] < self._begun:
            return
        at = time.monotonic()
        with self._lock:
            if at - self._told.get(said["instance"], -math.inf) < _REPEAT_SECONDS:
                return
            self._told = {other: told for other, told in self._told.items() if at - told < _REPEAT_SECONDS}
            self._told[said["instance"]] = at
        log.warning(
            "worker_id_shared",
            worker_id=self._worker_id,
            other_host=said["host"],
            other_pid=said["pid"],
            consequence="`reeld top` shows both as one, and `reeld drain` stops both: set worker_id in one of them",
        )


def _read(body: bytes) -> dict[str, Any] | None:
    """Of a heartbeat, who says it and when; None for what is none, or is of a version that did not say."""
    try:
        event = json.loads(body)
        data = event["data"]
        return {
            "instance": str(data["instance"]),
            "host": data["host"],
            "pid": data["pid"],
            "sent_at": str(event["time"]),  # in UTC and of one length, so that it sorts
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
