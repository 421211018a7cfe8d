"""A worker with an endpoint and a broker of its own, as its operator sees it.

Owns starting it, asking its endpoint, and waiting for what that says. Leaves out what is tested.
"""

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pika
from prometheus_client.parser import text_string_to_metric_families

from daemon import client
from daemon.sections import BrokerConfig
from daemon.topology import Topology
from tests.harness import Worker, publish, write_config
from tests.node import Node

TOPOLOGY = Topology(prefix="reeld", pool="test", delivery_limit=3, retry_delays_seconds=(10, 60, 300))

SETTINGS = """
[metrics]
listen = "127.0.0.1:0"
[broker]
backoff_initial_seconds = 0.2
backoff_max_seconds = 1
[stall]
silence_seconds = 8
[log]
directory = "{folder}/logs"
"""


@dataclass
class Service:
    """A running worker, seen from outside."""

    worker: Worker
    node: Node
    folder: Path
    url: str
    """Of its endpoint."""
    while_loading: list[dict[str, Any]] = field(default_factory=list)
    """Every answer of /readyz until the first that said yes."""

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self, **labels: str) -> dict[str, float]:
        """The samples of its endpoint now, by name, each summed over the series that have these labels."""
        sums: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                if labels.items() <= sample.labels.items():
                    sums[sample.name] += sample.value
        return dict(sums)

    def verdict(self, path: str) -> dict[str, Any]:
        """The answer of /livez or /readyz, whose status agrees with what it says."""
        status, body = self.get(path)
        answer: dict[str, Any] = json.loads(body)
        assert (status == 200) == answer[path.removeprefix("/").removesuffix("z")]
        assert (status == 200) == (answer["reasons"] == [])
        return answer

    def wait_verdict(self, path: str, holds: Callable[[dict[str, Any]], bool], timeout: float = 120) -> dict[str, Any]:
        """The first answer for which it holds; no event says when that is."""
        deadline = time.monotonic() + timeout
        while True:
            answer = self.verdict(path)
            if holds(answer):
                return answer
            assert self.worker.process.poll() is None, self.worker.tail()
            assert time.monotonic() < deadline, f"{path} said last: {answer}\n{self.worker.tail()}"
            time.sleep(0.05)

    def wait_ready(self, timeout: float = 180) -> None:
        self.wait_verdict("/readyz", lambda answer: bool(answer["ready"]), timeout)

    def wait_reason(self, path: str, reason: str, timeout: float = 120) -> dict[str, Any]:
        """Waits until the verdict is no for this reason, and returns it."""
        answer = self.wait_verdict(path, lambda each: any(r["reason"] == reason for r in each["reasons"]), timeout)
        found: dict[str, Any] = next(each for each in answer["reasons"] if each["reason"] == reason)
        return found

    def do(self, message: dict[str, Any], **properties: Any) -> str:
        """Publishes a job and waits for its end, in the log. Returns the event: job_succeeded, job_failed, …"""
        begun = len(self.worker.lines())
        publish(self.node.amqp_url, message, **properties)
        ends = ("job_succeeded", "job_failed", "job_cancelled", "job_malformed")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for line in self.worker.lines()[begun:]:
                if message["job_id"] in line and line.endswith("}") and json.loads(line)["event"] in ends:
                    return str(json.loads(line)["event"])
            assert self.worker.process.poll() is None, self.worker.tail()
            time.sleep(0.1)
        raise AssertionError(self.worker.tail())

    def rank_pid(self, rank: int) -> int:
        pids: list[int] = [line["pid"] for line in self.worker.logs() if line["rank"] == rank]
        return pids[-1]


def _listen(url: str) -> None:
    """Somebody listens to events, as in any real use: else each last event were logged as unrouted."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare("listener", durable=True)
    channel.queue_bind("listener", TOPOLOGY.status_exchange, "#")
    connection.close()


@contextlib.contextmanager
def running_service(models: Path, folder: Path) -> Iterator[Service]:
    """A worker of two ranks whose topology is not its own to declare, from its first moment until it is ready."""
    with Node(folder / "node") as node:
        assert client.apply_on(BrokerConfig(url=node.amqp_url), TOPOLOGY) == []
        _listen(node.amqp_url)
        config = write_config(folder, models, nproc=2)
        text = config.read_text().replace("apply = true", "apply = false")
        config.write_text(text + SETTINGS.format(folder=folder))
        worker = Worker(config, node.amqp_url, folder)
        try:
            url = worker.wait_log("metrics_listening")["url"]
            running = Service(worker, node, folder, url)

            def note(answer: dict[str, Any]) -> bool:
                running.while_loading.append(answer)
                return bool(answer["ready"])

            running.wait_verdict("/readyz", note, timeout=300)
            yield running
        finally:
            worker.end()
