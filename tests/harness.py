"""What tests of the whole share: a virtual host, a running worker, and an ear on the status exchange.

Everything waits for events (a message, the end of a process), never for a time to pass.
"""

import base64
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pika

from ops.private_broker import PrivateBroker

LOG_FIELDS = {
    "timestamp", "level", "event", "logger", "service", "version", "host", "pid", "rank", "local_rank", "world_size",
}  # fmt: skip


def management(broker: PrivateBroker, method: str, path: str) -> None:
    """A call of RabbitMQ's management API; raises on any status from 400."""
    request = urllib.request.Request(f"{broker.management_url}{path}", method=method)
    request.add_header("Authorization", "Basic " + base64.b64encode(b"guest:guest").decode())
    with urllib.request.urlopen(request, timeout=30) as response:
        response.read()


@contextlib.contextmanager
def fresh_vhost(broker: PrivateBroker) -> Iterator[str]:
    """The AMQP URL of a virtual host of its own, deleted with all that is in it afterwards."""
    name = f"test-{secrets.token_hex(6)}"
    management(broker, "PUT", f"/api/vhosts/{name}")
    try:
        yield broker.amqp_url.removesuffix("%2F") + name
    finally:
        management(broker, "DELETE", f"/api/vhosts/{name}")


def until(holds: Callable[[], object], *, timeout: float = 20) -> None:
    """Waits for what no event tells of."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass(frozen=True)
class Seen:
    """One event as it came over the status exchange."""

    routing_key: str
    event: dict[str, Any]

    @property
    def name(self) -> str:
        return self.routing_key.rpartition(".")[2]

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = self.event["data"]
        return data


class Ear:
    """Listens to every event of a virtual host, from a thread of its own."""

    def __init__(self, url: str) -> None:
        self._seen: list[Seen] = []
        self._changed = threading.Condition()
        self._connection = pika.BlockingConnection(pika.URLParameters(url))
        self._channel = self._connection.channel()
        self._channel.exchange_declare("reeld.unrouted", "fanout", durable=True)
        self._channel.exchange_declare(
            "reeld.status", "topic", durable=True, arguments={"alternate-exchange": "reeld.unrouted"}
        )
        queue = self._channel.queue_declare("", exclusive=True).method.queue
        self._channel.queue_bind(queue, "reeld.status", "#")
        self._channel.basic_consume(queue, self._on_message, auto_ack=True)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def all(self, *, job_id: str | None = None, name: str | None = None) -> list[Seen]:
        with self._changed:
            seen = list(self._seen)
        return [
            each
            for each in seen
            if (name is None or each.name == name) and (job_id is None or each.routing_key.startswith(f"job.{job_id}."))
        ]

    def wait(
        self,
        holds: Callable[[Seen], bool],
        *,
        after: int = 0,
        timeout: float = 120,
        worker: "Worker | None" = None,
    ) -> Seen:
        """The first event from number `after` on for which `holds`. Fails when the worker ends or time runs out."""
        deadline = time.monotonic() + timeout
        number = after
        with self._changed:
            while True:
                while number < len(self._seen):
                    if holds(self._seen[number]):
                        return self._seen[number]
                    number += 1
                if worker is not None and worker.process.poll() is not None:
                    raise AssertionError(f"the worker ended with {worker.process.returncode}\n{worker.tail()}")
                if time.monotonic() > deadline:
                    raise AssertionError(f"no such event in {timeout} s\n{worker.tail() if worker else ''}")
                self._changed.wait(1)

    def terminal(self, job_id: str, *, worker: "Worker | None" = None, timeout: float = 120) -> Seen:
        names = ("succeeded", "failed", "cancelled")
        return self.wait(
            lambda seen: seen.routing_key.startswith(f"job.{job_id}.") and seen.name in names,
            worker=worker,
            timeout=timeout,
        )

    @property
    def count(self) -> int:
        with self._changed:
            return len(self._seen)

    def close(self) -> None:
        self._stopping = True
        self._connection.add_callback_threadsafe(self._channel.stop_consuming)
        self._thread.join(10)

    def _run(self) -> None:
        self._channel.start_consuming()
        self._connection.close()

    def _on_message(self, _channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        with self._changed:
            self._seen.append(Seen(method.routing_key, json.loads(body)))
            self._changed.notify_all()


class Faults:
    """Faults that the ranks of a worker meet inside the model, told in a file (`tests/faults/sitecustomize.py`)."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "faults.json"
        self._told: list[dict[str, Any]] = []
        self._path.write_text("[]")
        self.environment = {
            "PYTHONPATH": str(Path(__file__).with_name("faults")),
            "FAULTS_FILE": str(self._path),
        }

    def tell(self, job: dict[str, Any], action: str, **fault: Any) -> None:
        """Before the job is published: what its ranks meet, once unless `times` says otherwise."""
        self._told.append({"id": uuid.uuid4().hex, "job_id": job["job_id"], "action": action, **fault})
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._told))
        new.replace(self._path)


class Worker:
    """A daemon as a user starts it: `reeld run`, or another command, with its output in a file."""

    def __init__(
        self,
        config: Path,
        url: str | None,
        folder: Path,
        *,
        command: list[str] | None = None,
        faults: "Faults | None" = None,
    ) -> None:
        self.log_path = folder / f"log-{uuid.uuid4().hex[:8]}.jsonl"
        self.url = url
        reeld = str(Path(sys.executable).parent / "reeld")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("REELD_")}
        environment |= {"OMP_NUM_THREADS": "1", "REELD_CONFIG": str(config)}
        if url is not None:
            environment["REELD_AMQP_URL"] = url
        if faults is not None:
            environment |= faults.environment
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command or [reeld, "run", "--config", str(config)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def lines(self) -> list[str]:
        return self.log_path.read_text().splitlines()

    def logs(self) -> list[dict[str, Any]]:
        """Every line parsed. Fails on a line that does not parse, or that lacks a field of the design's §8."""
        parsed = []
        for line in self.lines():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise AssertionError(f"not JSON: {line[:300]!r}") from error
            assert set(record) >= LOG_FIELDS, f"fields missing: {line[:300]}"
            parsed.append(record)
        return parsed

    def wait_log(self, event: str, *, after: int = 0, timeout: float = 120, **fields: Any) -> dict[str, Any]:
        """The first line from number `after` on with this event and these fields. Fails when the worker ends first."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            for line in self.lines()[after:]:
                if f'"{event}"' not in line or not line.endswith("}"):
                    continue
                record: dict[str, Any] = json.loads(line)
                if record["event"] == event and all(record.get(key) == value for key, value in fields.items()):
                    return record
            assert not ended, f"the worker ended with {self.process.returncode}\n{self.tail()}"
            assert time.monotonic() < deadline, f"no {event} {fields} in {timeout} s\n{self.tail()}"
            time.sleep(0.1)  # a growing file offers no event to wait for

    def tail(self) -> str:
        return "\n".join(line[:500] for line in self.lines()[-25:])

    def drain(self, timeout: float = 60) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def end(self) -> None:
        """Ends whatever is left; only this worker's own session."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


def write_config(folder: Path, models: Path, *, nproc: int, extra: str = "", topology: str = "") -> Path:
    """A configuration for the tiny models, on the CPU or TEST_DEVICE, with its directories under `folder`."""
    device = os.environ.get("TEST_DEVICE", "cpu")
    path = folder / "reeld.toml"
    path.write_text(
        f"""
pool = "test"
worker_id = "tester"
nproc_per_node = {nproc}
device = "{device}"
dtype = "{"float32" if device == "cpu" else "bfloat16"}"
heartbeat_seconds = 0.5
work_directory = "{folder}/work"
{extra}
[topology]
apply = true
{topology}
[inputs]
schemes = ["file"]
roots = ["{folder}"]
[output]
directory = "{folder}/output"
[limits]
outcome_grace_seconds = 10
io_attempts = 2
[[models]]
profile = "tiny-t2v"
path = "{models}/tiny-t2v"
[[models]]
profile = "tiny-i2v"
path = "{models}/tiny-i2v"
"""
    )
    return path


def job(**fields: Any) -> dict[str, Any]:
    """A small text-to-video job; `fields` replace its own."""
    return {
        "schema": "reeld.job/1",
        "job_id": str(uuid.uuid4()),
        "task": "text_to_video",
        "prompt": "a red fox runs through snow",
        "parameters": {"seed": 7, "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 4},
        "output": {"fps": 8},
        **fields,
    }


def publish(url: str, message: dict[str, Any] | bytes, *, pool: str = "test", **properties: Any) -> None:
    """Publishes one job, mandatory and confirmed."""
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish(
            "reeld.jobs",
            pool,
            body,
            pika.BasicProperties(delivery_mode=2, content_type="application/json", **properties),
            mandatory=True,
        )
    finally:
        connection.close()


def take(url: str, queue: str) -> list[tuple[Any, bytes]]:
    """Everything in a queue, acked: (properties, body)."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        taken: list[tuple[Any, bytes]] = []
        while True:
            method, properties, body = channel.basic_get(queue, auto_ack=True)
            if method is None:
                return taken
            taken.append((properties, body))
    finally:
        connection.close()


def idle(seen: Seen) -> bool:
    """A heartbeat of a worker that waits for jobs on every rank."""
    return (
        seen.name == "heartbeat"
        and seen.data["consumer"] == "consuming"
        and all(rank["state"] == "idle" for rank in seen.data["ranks"])
    )
