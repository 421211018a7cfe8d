"""A daemon of one rank whose broker, or the network to it, misbehaves; and what must hold afterwards.

Owns the daemon, the proxy before it and a durable queue that hears every job's events. Leaves out the faults
(`tests.proxy`, `tests.node`).
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pika

from daemon import client
from daemon.events import TERMINAL
from daemon.sections import BrokerConfig
from daemon.topology import Topology
from tests.harness import Worker, job, publish, take, write_config
from tests.proxy import Proxy

TOPOLOGY = Topology(prefix="reeld", pool="test", delivery_limit=3, retry_delays_seconds=(1, 2, 600))
HEARTBEAT_SECONDS = 5
AUDIT = "audit"

BROKER_SECTION = f"""
[broker]
heartbeat_seconds = {HEARTBEAT_SECONDS}
connect_timeout_seconds = 2
confirm_timeout_seconds = 3
backoff_initial_seconds = 0.2
backoff_max_seconds = 1
"""


class DaemonUnderFault:
    """`url` leads to the broker itself; only the daemon goes through `proxy`."""

    def __init__(self, worker: Worker, proxy: Proxy, url: str, folder: Path) -> None:
        self.worker, self.proxy, self.url, self.folder = worker, proxy, url, folder
        self._events: list[tuple[str, str, str]] = []  # subject, name, id

    def publish(self, message: dict[str, Any], **properties: Any) -> str:
        publish(self.url, message, **properties)
        return str(message["job_id"])

    def publish_long(self, *, steps: int = 100) -> str:
        """A job that takes some seconds; returns its id once it is being generated."""
        parameters = {"seed": 1, "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": steps}
        job_id = self.publish(job(parameters=parameters))
        self.worker.wait_log("job_started", job_id=job_id)
        return job_id

    def ends(self, job_id: str) -> list[tuple[str, str]]:
        """Name and id of each terminal event of a job, as they came."""
        return [(name, event_id) for subject, name, event_id in self._heard() if subject == job_id and name in TERMINAL]

    def progress(self, job_id: str) -> int:
        """How many progress events of the job were heard."""
        return sum(subject == job_id and name == "progress" for subject, name, _ in self._heard())

    def hear_heartbeats(self) -> None:
        """From here on the audit queue hears of workers as well."""
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        connection.channel().queue_bind(AUDIT, TOPOLOGY.status_exchange, "worker.#")
        connection.close()

    def wait_for(self, holds: Callable[[], bool], *, at_most: float = 120) -> None:
        """Until it holds; for what no log line says. Fails when the time is up or the worker has ended."""
        deadline = time.monotonic() + at_most
        while not holds():
            assert self.worker.process.poll() is None, self.worker.tail()
            assert time.monotonic() < deadline, f"not so in {at_most:g} s\n{self.worker.tail()}"
            time.sleep(0.1)

    def _heard(self) -> list[tuple[str, str, str]]:
        for _, body in take(self.url, AUDIT):
            event = json.loads(body)
            self._events.append((event["subject"], event["type"].rpartition(".")[2], event["id"]))
        return self._events

    def started(self, job_id: str) -> int:
        """How often the job's generation was begun."""
        return sum(line["event"] == "job_started" and line.get("job_id") == job_id for line in self.worker.logs())

    def events(self, event: str, *, after: int = 0) -> list[dict[str, Any]]:
        return [line for line in self.worker.logs()[after:] if line["event"] == event]

    def check_done_once(self, job_id: str) -> None:
        """The job was generated once and ended once, its delivery is settled, and nothing else is left of it."""
        self.check_serves()
        ends = self.ends(job_id)
        assert {name for name, _ in ends} == {"succeeded"}, ends
        assert len(set(ends)) == 1, f"a repeat must be the same event: {ends}"
        assert self.started(job_id) == 1
        kept = sorted(path.name for path in (self.folder / "output" / job_id).iterdir())
        assert [Path(name).suffix for name in kept] == [".json", ".mp4"], kept
        assert take(self.url, TOPOLOGY.dead_queue) == []

    def check_serves(self) -> None:
        """The next job is done. With prefetch_count 1 it only comes when every earlier delivery is settled."""
        job_id = self.publish(job())
        self.worker.wait_log("job_succeeded", job_id=job_id)

    def check_refused(self, body: bytes, *, code: str, path: str, **properties: Any) -> str:
        """Publishes `body` ("ID" becomes a job id) and checks that it ends as a dead letter and one failed event that
        say so, and that nothing was begun. Returns the reason given."""
        job_id = str(uuid.uuid4())
        body = body.replace(b'"ID"', f'"{job_id}"'.encode())
        publish(self.url, body, message_id=job_id, **properties)
        self.check_serves()
        (letter,) = take(self.url, TOPOLOGY.dead_queue)
        assert (letter[0].headers["x-reeld-code"], letter[0].headers["x-reeld-path"]) == (code, path)
        assert letter[1] == body
        assert [name for name, _ in self.ends(job_id)] == ["failed"]
        assert self.started(job_id) == 0
        return str(letter[0].headers["x-reeld-message"])

    def rank0(self) -> int:
        pids: list[int] = [line["pid"] for line in self.worker.logs() if line["rank"] == 0]
        return pids[-1]


def prepare_broker(url: str) -> None:
    """The topology, and the queue that hears of jobs."""
    assert client.apply_on(BrokerConfig(url=url), TOPOLOGY) == []
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(AUDIT, durable=True)
    channel.queue_bind(AUDIT, TOPOLOGY.status_exchange, "job.#")
    connection.close()


def daemon_config(folder: Path, models: Path, *, topology: str = "", broker: str = BROKER_SECTION) -> Path:
    """A configuration of a daemon that only checks the topology."""
    path = write_config(
        folder, models, nproc=1, extra=broker, topology=f"retry_delays_seconds = [1, 2, 600]\n{topology}"
    )
    path.write_text(path.read_text().replace("apply = true", "apply = false"))
    return path


@contextmanager
def daemon_under_fault(
    url: str, broker_port: int, folder: Path, models: Path, *, topology: str = "", wait: bool = True
) -> Iterator[DaemonUnderFault]:
    """A running daemon; its logs are checked line by line at the end."""
    with Proxy(broker_port) as proxy:
        worker = Worker(daemon_config(folder, models, topology=topology), proxy.through(url), folder)
        try:
            if wait:
                worker.wait_log("consuming")
            yield DaemonUnderFault(worker, proxy, url, folder)
            worker.logs()
        finally:
            worker.end()
