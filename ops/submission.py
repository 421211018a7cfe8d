"""`reeld submit`: one job from the command line, published and, if wanted, followed to its end.

Owns building the job's document and waiting for its terminal event. Leaves out the schema (`daemon.job`) and
AMQP (`daemon.client`).
"""

import json
import os
import re
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console

from daemon.client import EventStream, ReceivedEvent, publish_job
from daemon.errors import BrokerUnavailableError, JobError
from daemon.events import TERMINAL
from daemon.job import SCHEMA, is_job_id, parse_job_message
from daemon.sections import BrokerConfig
from ops.failure import CommandFailedError, JobFailedError, UsageError
from ops.progress import failure_text, job_display, result_lines

_MAX_BODY_BYTES = 15 * 1024 * 1024  # RabbitMQ 4 takes messages up to 16 MiB
_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


def new_job_id() -> str:
    """A version 7 UUID (RFC 9562, 5.7): ids sort by the time they were made."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def read_document(source: str) -> dict[str, Any]:
    """Reads a job document from a file, or from standard input for `-`. Raises UsageError."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        document = json.loads(text)
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{source}: not JSON in UTF-8: {error}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{source}: must hold one JSON object")
    return document


def build_document(base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Lays the options over the document; `a.b` is field b of the object a, None means not given."""
    document = {"schema": SCHEMA, **json.loads(json.dumps(base))}
    for path, value in options.items():
        if value is None:
            continue
        *parents, name = path.split(".")
        table = document
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UsageError(f"{parent}: must be an object")
        table[name] = value
    return document


def image_uri(image: str) -> str:
    """A URI as it is; a local path as a file: URI. Raises UsageError when there is no such file."""
    if _URI.match(image):
        return image
    path = Path(image).resolve()
    if not path.is_file():
        raise UsageError(f"--image {image}: no such file")
    return path.as_uri()


def submit(
    broker: BrokerConfig,
    pool: str,
    document: dict[str, Any],
    *,
    validate: bool = True,
    wait: bool = False,
    timeout_seconds: float | None = None,
) -> None:
    """Publishes a job, prints its id on stdout, and follows it to its end when `wait` is set."""
    job_id = document.setdefault("job_id", new_job_id())
    if not isinstance(job_id, str) or not is_job_id(job_id):
        raise UsageError("job_id: letters, digits, '.', '_' and '-' only, at most 128")
    body = json.dumps(document, ensure_ascii=False).encode()
    if validate:
        try:
            parse_job_message(body, max_body_bytes=_MAX_BODY_BYTES)
        except JobError as error:
            raise UsageError(f"not a valid job: {error.message} (see `reeld schema job`)") from error
    if not wait:
        publish_job(broker, pool=pool, body=body, message_id=job_id)
        print(job_id)
        return
    # Bound before the job is published, so that no event can be missed.
    with EventStream(broker, [f"job.{job_id}.*"]) as stream:
        publish_job(broker, pool=pool, body=body, message_id=job_id)
        print(job_id, flush=True)
        _finish(job_id, _follow(stream, job_id, timeout_seconds))


def _follow(stream: EventStream, job_id: str, timeout_seconds: float | None) -> ReceivedEvent:
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    later = f"the job goes on; `reeld watch --job {job_id}` follows it"
    display = job_display(Console(stderr=True))
    try:
        with display:
            display.add(job_id, "job")
            while True:
                left = 3600.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise CommandFailedError(f"job {job_id}: not finished after {timeout_seconds:g} s; {later}")
                event = stream.next(left)
                if event is None:
                    continue
                display.show(event)
                if event.name in TERMINAL:
                    return event
    except BrokerUnavailableError as error:
        raise BrokerUnavailableError(f"{error}; {later}") from error
    except KeyboardInterrupt:
        raise CommandFailedError(f"interrupted; {later}") from None


def _finish(job_id: str, event: ReceivedEvent) -> None:
    match event.name:
        case "succeeded":
            for line in result_lines(event.data):
                print(line)
        case "failed":
            raise JobFailedError(f"job {job_id} failed: {failure_text(event.data)}")
        case _:
            raise JobFailedError(f"job {job_id} was cancelled")
