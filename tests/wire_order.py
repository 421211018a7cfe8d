"""What was durable when: the frames of a history, walked through in their order.

Owns which confirmed message stands for which outcome. Leaves out the verdict (`tests.checker`).
"""

from tests.history import Acked, Confirmed, Delivered, Record, Run


class Wire:
    """All frames seen so far."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._deliveries: dict[tuple[int, int, int], tuple[int, Delivered]] = {}
        self._routing_keys: set[str] = set()
        self._dead: dict[tuple[str, str | None], int] = {}
        self._ladder: dict[tuple[str, str | None], int] = {}

    def see(self, number: int, record: Record) -> None:
        """Takes in record number `number`; kinds that no frame stands behind are passed over."""
        match record:
            case Delivered() if record.queue == self._run.jobs_queue:
                self._deliveries[record.connection, record.channel, record.delivery_tag] = (number, record)
            case Confirmed() if record.exchange == self._run.status_exchange:
                self._routing_keys.add(record.routing_key)
            case Confirmed() if record.exchange == self._run.dead_exchange:
                self._dead[record.body, record.message_id] = number
            case Confirmed() if not record.exchange and record.routing_key.startswith(f"{self._run.jobs_queue}.retry."):
                self._ladder[record.body, record.message_id] = number
            case _:
                pass

    def delivery_of(self, ack: Acked) -> tuple[int, Delivered | None]:
        """The delivery that an ack is for, with its number; None when it is not of the job queue."""
        return self._deliveries.get((ack.connection, ack.channel, ack.delivery_tag), (0, None))

    def told(self, job_id: str | None, name: str) -> bool:
        """Whether the broker has confirmed this event of the job."""
        return job_id is not None and f"job.{job_id}.{name}" in self._routing_keys

    def dead_lettered(self, body: str, message_id: str | None, *, since: int) -> bool:
        """Whether the broker has confirmed a dead letter of the message since record `since`."""
        return self._dead.get((body, message_id), -1) > since

    def retried(self, body: str, message_id: str | None, *, since: int) -> bool:
        """Whether the broker has confirmed a copy on the retry ladder since record `since`."""
        return self._ladder.get((body, message_id), -1) > since
