"""What people ask of the daemon while it works: to drain, to hand its job back, to cancel a job.

Owns these wishes and the waits that they cut short. Leaves out obeying them (`daemon.coordinator`).
"""

import threading
import time
from concurrent.futures import Future

from daemon.cancellations import Cancellations
from daemon.errors import JobCancelled, JobHandedBack
from parallel.outcome import Stop

DRAINED_BY_MESSAGE = "control"


class Asked:
    """The wishes so far. For any thread, and for signal handlers."""

    def __init__(self, cancelled: Cancellations, *, drain_seconds: float) -> None:
        self.cancelled = cancelled
        self.drain_reason: str | None = None
        self._drain_seconds = drain_seconds
        self._drain_deadline: float | None = None
        self._hand_back = False
        # Reentrant, because a signal handler may come in while the main thread holds it. Whoever holds it waits for no
        # other lock: the main thread, which the handler has interrupted, may be the one that has that.
        self._changed = threading.Condition(threading.RLock())

    def drain(self, reason: str) -> None:
        """Finish the job in hand and stop. A second signal: hand the job back at once.

        A message counts for none: whoever sends it again may not have heard the answer, and `systemctl stop` may
        follow `reeld drain`.
        """
        with self._changed:
            if self.drain_reason is None:
                self.drain_reason = reason
                self._drain_deadline = time.monotonic() + self._drain_seconds
            elif self.drain_reason == DRAINED_BY_MESSAGE:
                self.drain_reason = reason
            elif reason != DRAINED_BY_MESSAGE:
                self._hand_back = True
            self._changed.notify_all()

    def cancel(self, job_id: str) -> Future[None]:
        """End this job: the one in hand, or whenever it is met. Holds the caller up for no disk.

        What it returns is done once the cancel is in its file, so that a restart knows of it too.
        """
        kept = self.cancelled.add(job_id)
        with self._changed:
            self._changed.notify_all()
        return kept

    def stop(self, job_id: str) -> Stop:
        """Whether this job must stop before its next step."""
        if job_id in self.cancelled:
            return Stop.CANCELLED
        return Stop.HAND_BACK if self.must_hand_back() else Stop.NO

    def pause(self, seconds: float, job_id: str | None) -> None:
        """Waits between two tries.

        Raises JobHandedBack once the daemon must stop, JobCancelled once the job is cancelled, if it has a `job_id`.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                if job_id is not None and job_id in self.cancelled:
                    raise JobCancelled
                if self.must_hand_back():
                    raise JobHandedBack
                now = time.monotonic()
                if now >= end:
                    return
                self._changed.wait(min(end, self._drain_deadline or end) - now)

    def must_hand_back(self) -> bool:
        """Whether the drain takes too long, or somebody asked a second time: what is not done goes back."""
        overdue = self._drain_deadline is not None and time.monotonic() > self._drain_deadline
        return overdue or self._hand_back
