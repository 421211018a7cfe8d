"""Events: CloudEvents 1.0 in JSON on the status exchange.

Owns the event's envelope, its routing key and the names of the events. Leaves out publishing
(`daemon.publisher`).
Source of the format: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
"""

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

CONTENT_TYPE = "application/cloudevents+json"
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event. `routing_key` is its address on the status exchange, `body` its JSON."""

    event_id: str
    type: str
    subject: str
    routing_key: str
    body: bytes


def job_event(
    name: str,
    *,
    job_id: str,
    worker_id: str,
    data: dict[str, Any],
    event_id: str | None = None,
    traceparent: str | None = None,
) -> Event:
    """`job.<job_id>.<name>`. A terminal event takes a fixed `event_id`, so that a repeat is recognised."""
    extensions = {"traceparent": traceparent} if traceparent else {}
    return _event(
        f"job.{job_id}.{name}",
        f"reeld.job.{name}",
        job_id,
        worker_id,
        {"job_id": job_id, **data},
        event_id,
        extensions,
    )


def worker_event(name: str, *, worker_id: str, data: dict[str, Any]) -> Event:
    """`worker.<worker_id>.<name>`."""
    return _event(f"worker.{worker_id}.{name}", f"reeld.worker.{name}", worker_id, worker_id, data, None, {})


def heartbeat_key(worker_id: str) -> str:
    """The routing key of a worker's heartbeats."""
    return f"worker.{worker_id}.heartbeat"


def now() -> str:
    """Now as RFC 3339 in UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _event(
    routing_key: str,
    type_: str,
    subject: str,
    worker_id: str,
    data: dict[str, Any],
    event_id: str | None,
    extensions: dict[str, str],
) -> Event:
    event_id = event_id or str(uuid.uuid4())
    envelope = {
        "specversion": "1.0",
        "id": event_id,
        "source": f"/reeld/{worker_id}",
        "type": type_,
        "subject": subject,
        "time": now(),
        "datacontenttype": "application/json",
        **extensions,
        "data": data,
    }
    body = json.dumps(envelope, separators=(",", ":"), ensure_ascii=False).encode()
    return Event(event_id=event_id, type=type_, subject=subject, routing_key=routing_key, body=body)
