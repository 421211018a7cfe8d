"""`reeld drain`: workers are asked to finish their job and stop, by a message, from anywhere.

Owns whom to ask, who answered, and the wait for their end. Leaves out obeying (`daemon.coordinator`).
"""

import sys
import time

from daemon.client import EventStream, ReceivedEvent, tell_workers
from daemon.errors import UnroutablePublishError
from daemon.sections import BrokerConfig
from ops.ages import age_text
from ops.failure import CommandFailedError
from ops.fleet import Fleet, hear

_ANSWER_SECONDS = 20.0
_DISCOVERY_SECONDS = 15.0


def drain(
    broker: BrokerConfig, worker_ids: list[str], *, every: bool, wait: bool, timeout_seconds: float | None
) -> None:
    """Asks each worker, prints each answer, and with `wait` also each end.

    Raises CommandFailedError when one does not listen, does not answer, falls silent, or outlasts the timeout.
    """
    fleet = Fleet()
    with EventStream(broker, ["worker.#"]) as stream:
        if every:
            hear(stream, fleet, timeout_seconds=_DISCOVERY_SECONDS)
            worker_ids = sorted(name for name, worker in fleet.workers.items() if worker.life != "stopped")
            if not worker_ids:
                raise CommandFailedError(f"no worker was heard in {_DISCOVERY_SECONDS:g} s")
        asked = [worker_id for worker_id in worker_ids if _ask(broker, worker_id)]
        waiting = _Waiting(fleet, asked)
        waiting.for_answers(stream)
        if wait:
            waiting.for_ends(stream, timeout_seconds)
    if len(waiting.answered) < len(worker_ids):
        missing = [worker_id for worker_id in worker_ids if worker_id not in waiting.answered]
        raise CommandFailedError(f"not drained: {', '.join(missing)}; `reeld top --once` lists the workers")


def _ask(broker: BrokerConfig, worker_id: str) -> bool:
    try:
        tell_workers(broker, f"drain.{worker_id}")
    except UnroutablePublishError:
        text = "no such worker listens (it is down, it still loads its model, or it has lost its broker)"
        print(f"reeld: {worker_id}: {text}", file=sys.stderr)
        return False
    return True


class _Waiting:
    def __init__(self, fleet: Fleet, asked: list[str]) -> None:
        self._fleet = fleet
        self._asked = asked
        self._steps: dict[str, object] = {}
        self.answered: set[str] = set()
        self._stopped: set[str] = set()

    def for_answers(self, stream: EventStream) -> None:
        deadline = time.monotonic() + _ANSWER_SECONDS
        while len(self.answered) < len(self._asked) and (left := deadline - time.monotonic()) > 0:
            self._take(stream.next(left))
        for worker_id in self._asked:
            if worker_id not in self.answered:
                print(
                    f"reeld: {worker_id}: got the message, but said nothing in {_ANSWER_SECONDS:g} s", file=sys.stderr
                )

    def for_ends(self, stream: EventStream, timeout_seconds: float | None) -> None:
        """Raises CommandFailedError for the first worker that falls silent, and after the timeout."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while left := self.answered - self._stopped:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise CommandFailedError(f"still draining after {timeout_seconds:g} s: {', '.join(sorted(left))}")
            for worker_id in left:
                worker = self._fleet.workers[worker_id]
                if worker.is_silent(now):
                    age = age_text(worker.age_seconds(now))
                    raise CommandFailedError(f"{worker_id}: silent for {age}, and it did not say that it stopped")
            self._take(stream.next(1.0 if deadline is None else min(1.0, deadline - now)), tell_progress=True)

    def _take(self, event: ReceivedEvent | None, *, tell_progress: bool = False) -> None:
        if event is None:
            return
        self._fleet.take(event, now=time.monotonic())
        worker_id = str(event.data.get("worker_id"))
        if worker_id not in self._asked:
            return
        match event.name:
            case "draining" if worker_id not in self.answered:
                self.answered.add(worker_id)
                job = event.data.get("job_id")
                print(f"{worker_id}: draining, " + (f"finishes job {job}" if job else "no job in hand"), flush=True)
            case "stopped":
                self.answered.add(worker_id)
                self._stopped.add(worker_id)
                print(f"{worker_id}: stopped", flush=True)
            case "heartbeat" if tell_progress:
                rank = (self._fleet.workers[worker_id].ranks or [{}])[0]
                step = (rank.get("phase"), rank.get("step"), rank.get("steps"))
                if step != self._steps.get(worker_id) and rank.get("steps"):
                    self._steps[worker_id] = step
                    print(f"{worker_id}: {rank.get('phase')} {rank.get('step')}/{rank.get('steps')}", flush=True)
