"""`reeld cancel`: a job is ended, or kept from starting, by a message to all workers.

Owns asking, what each worker's answer means, and the wait for the job's end. Leaves out obeying (`daemon.coordinator`).
"""

import time

from daemon.client import EventStream, ReceivedEvent, tell_workers
from daemon.errors import UnroutablePublishError
from daemon.events import TERMINAL
from daemon.job import is_job_id
from daemon.sections import BrokerConfig
from ops.failure import CommandFailedError, UsageError

_ANSWER_SECONDS = 10.0
_OTHERS_SECONDS = 2.0  # nobody knows how many workers there are: so long after the last answer no other is waited for

_MEANINGS = {
    "running": "it stops at its next step",
    "finishing": "too late, its video is being written",
    "succeeded": "too late, it was done before",
    "unknown": "not here; where a worker meets it, it does not start",
}


def cancel(broker: BrokerConfig, job_id: str, *, wait: bool, timeout_seconds: float | None) -> None:
    """Asks all workers, prints each answer, and with `wait` also how the job ended.

    Raises UsageError for what is no id; CommandFailedError when nobody listens or answers, and with `wait` when the job
    ended otherwise or outlasts the timeout.
    """
    if not is_job_id(job_id):
        raise UsageError(f"{job_id}: no job can have this id")
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    # Bound before the message is published, so that no answer can be missed.
    with EventStream(broker, [f"job.{job_id}.*"]) as stream:
        try:
            tell_workers(broker, f"cancel.{job_id}")
        except UnroutablePublishError as error:
            raise CommandFailedError(
                f"{job_id}: no worker listens, so nobody will remember the cancel; `reeld top --once` lists the workers"
            ) from error
        waiting = _Waiting(job_id)
        waiting.for_answers(stream)
        if wait:
            waiting.for_end(stream, deadline, timeout_seconds)


class _Waiting:
    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._states: dict[str, str] = {}
        self._end: str | None = None

    def for_answers(self, stream: EventStream) -> None:
        """Until no more come. Raises CommandFailedError when none does."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            if self._take(stream.next(left)):
                deadline = time.monotonic() + _OTHERS_SECONDS
        if not self._states:
            raise CommandFailedError(f"{self._job_id}: no worker answered in {_ANSWER_SECONDS:g} s; ask again")

    def for_end(self, stream: EventStream, deadline: float | None, timeout_seconds: float | None) -> None:
        """Raises CommandFailedError when the job did not end as cancelled."""
        if self._end is None and "succeeded" in self._states.values():
            self._end = "succeeded"  # before: nobody will tell of it again
        while self._end is None:
            left = 3600.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise CommandFailedError(
                    f"job {self._job_id}: not ended after {timeout_seconds:g} s; it stays cancelled"
                )
            self._take(stream.next(left))
        if self._end != "cancelled":
            raise CommandFailedError(f"job {self._job_id} {self._end}: the cancel came too late")
        print(f"job {self._job_id} was cancelled")

    def _take(self, event: ReceivedEvent | None) -> bool:
        """Whether it was the first answer of a worker."""
        if event is None:
            return False
        if event.name in TERMINAL:
            self._end = event.name
            return False
        worker_id = str(event.data.get("worker_id"))
        if event.name != "cancel_noted" or worker_id in self._states:
            return False
        state = str(event.data.get("state"))
        self._states[worker_id] = state
        meaning = _MEANINGS.get(state)
        print(f"{worker_id}: {state}" + (f" ({meaning})" if meaning else ""), flush=True)
        return True
