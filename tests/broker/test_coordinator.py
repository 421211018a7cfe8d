"""The coordinator's edge against a real broker, in this process: what a manifest answers, and how it leaves.

Consumer, publisher, reporter and storage are the daemon's own. There are no models, so that a job which is begun fails
as `unsupported_task`, which leaves a dead letter.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy
import pika
import pytest

from daemon import client
from daemon.attempt import RankContext
from daemon.config import Config
from daemon.consumer import Consumer
from daemon.coordinator import Coordinator
from daemon.delivery import Delivery
from daemon.errors import ConfigError
from daemon.finisher import Generated
from daemon.health import RankState
from daemon.job import Job, make_job, parse_job_message
from daemon.planning import Draft
from daemon.publisher import Publisher
from daemon.reporter import Reporter
from daemon.sections import BrokerConfig
from daemon.stall import StallLimits
from daemon.storage import Storage
from daemon.topology import prepare_topology, topology_of
from tests.harness import job, publish, take, until
from tests.plans import PLAN


class Edge:
    """A coordinator that serves in a thread of its own."""

    def __init__(self, url: str, folder: Path, grace_seconds: float) -> None:
        self.config = Config.model_validate(
            {
                "pool": "test",
                "worker_id": "tester",
                "work_directory": folder / "work",
                "broker": BrokerConfig(url=url, backoff_initial_seconds=0.1, backoff_max_seconds=0.2),
                "output": {"directory": folder / "output"},
                "limits": {"outcome_grace_seconds": grace_seconds},
                "models": [{"profile": "tiny-t2v", "path": folder}],
            }
        )
        self.config.work_directory.mkdir()
        self.topology = topology_of(self.config)
        assert client.apply_on(self.config.broker, self.topology) == []
        self.storage = Storage(self.config.output.directory)
        self.publisher = Publisher(self.config.broker, worker_id="tester")
        self.consumer = Consumer(
            self.config.broker,
            self.topology,
            worker_id="tester",
            prepare=lambda connection: prepare_topology(connection, self.topology, apply=False),
            on_control=lambda _key: None,
            patience_seconds=0,
        )
        state = RankState(StallLimits(self.config.stall))
        context = RankContext(SimpleNamespace(world_size=1), {}, state, 3)  # type: ignore[arg-type]  # no group
        reporter = Reporter(self.publisher, self.topology, worker_id="tester")
        self.coordinator = Coordinator(self.config, context, self.consumer, reporter, self.storage)
        self.raised: BaseException | None = None
        self.thread = threading.Thread(target=self._serve)

    def start(self) -> None:
        """Returns once it consumes."""
        self.publisher.start()
        self.consumer.start()
        self.thread.start()
        assert self.consumer.consuming.wait(30)

    def wait(self, *, timeout: float = 60) -> None:
        """Until the coordinator serves no longer, and everything that it said is settled."""
        self.thread.join(timeout)
        assert not self.thread.is_alive()
        self.consumer.stop()
        self.publisher.stop()

    def _serve(self) -> None:
        try:
            self.coordinator.serve()
        except BaseException as error:  # noqa: BLE001  for the test to look at
            self.raised = error


@contextmanager
def serving(url: str, folder: Path, *, grace_seconds: float = 3) -> Iterator[Edge]:
    edge = Edge(url, folder, grace_seconds)
    try:
        yield edge
    finally:
        edge.coordinator.drain("SIGTERM")
        edge.coordinator.drain("SIGTERM")
        if edge.thread.ident is not None:
            edge.wait()


def test_a_finished_job_whose_event_is_not_confirmed_goes_back(vhost: str, tmp_path: Path) -> None:
    """The manifest answers a redelivery, but the wait for its event's confirm is given up: the job is neither begun nor
    dead-lettered beside its manifest."""
    message = job()
    with serving(vhost, tmp_path) as edge:
        parsed = make_job(parse_job_message(json.dumps(message).encode(), max_body_bytes=1 << 20), message_id=None)
        manifest = {"request_digest": parsed.request_digest, "result": {}}
        edge.storage.create_manifest(parsed.job_id, manifest)
        edge.start()
        with pika.BlockingConnection(pika.URLParameters(vhost)) as connection:
            connection.channel().exchange_delete(edge.topology.unrouted_terminal)  # so it is returned, not confirmed
        publish(vhost, message)
        until(lambda: edge.consumer.in_hand, timeout=30)
        edge.coordinator.drain("SIGTERM")
        edge.coordinator.drain("SIGTERM")
        edge.wait()
        assert edge.raised is None
        assert take(vhost, edge.topology.dead_queue) == []
        ((_, body),) = take(vhost, edge.topology.jobs_queue)
        assert json.loads(body) == message


class _SlowFrames:
    """Nine frames; the first comes when the test says so."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[SimpleNamespace]:
        self.begun.set()
        assert self.go_on.wait(60)
        for _ in range(9):
            yield SimpleNamespace(numpy=lambda: numpy.zeros((64, 96, 3), numpy.uint8))


@pytest.mark.parametrize("in_time", [True, False])
def test_a_lost_topology_does_not_cut_off_a_job_that_is_being_finished(
    vhost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    """Before the process ends, a job whose frames are there has the outcome grace for video, manifest and event."""
    frames = _SlowFrames()

    def run(self: Coordinator, job: Job, delivery: Delivery) -> bool:
        generated = Generated(
            job=job,
            delivery=delivery,
            draft=Draft(PLAN, fps=8, input_uris={}, switches_experts=False),
            plan=PLAN,
            frames=frames,
            timings={},
            accepted_at=time.monotonic(),
        )
        self._finisher.submit(generated)
        return False

    monkeypatch.setattr(Coordinator, "_run", run)  # no group generates here
    message = job()
    with serving(vhost, tmp_path, grace_seconds=30 if in_time else 3) as edge:
        edge.start()
        publish(vhost, message)
        assert frames.begun.wait(30)
        with pika.BlockingConnection(pika.URLParameters(vhost)) as connection:
            connection.channel().queue_delete(edge.topology.jobs_queue)
        until(lambda: edge.consumer.fatal, timeout=30)
        edge.thread.join(1)
        assert edge.thread.is_alive()
        if in_time:
            frames.go_on.set()
        edge.wait(timeout=40)
        assert isinstance(edge.raised, ConfigError)
        assert (edge.storage.read_manifest(message["job_id"]) is not None) == in_time
        frames.go_on.set()
        edge.coordinator._finisher.close()
        kept = [json.loads(body)["type"] for _, body in take(vhost, edge.topology.unrouted)]
        assert kept == (["reeld.job.succeeded"] if in_time else [])
