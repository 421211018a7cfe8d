"""Rows 1 to 3 and 8 to 11 of the fault matrix: a broker that is down, dies, is alarmed, or takes the queue away.

One node and one daemon serve all of them, in the order of the rows; the last one ends the daemon.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import client
from daemon.sections import BrokerConfig
from tests.broker.daemon_under_fault import AUDIT, TOPOLOGY, DaemonUnderFault, daemon_under_fault, prepare_broker
from tests.harness import job, take
from tests.node import Node
from tests.proxy import TO_BROKER

_PATIENCE_SECONDS = 15


class Scene:
    def __init__(self, node: Node, daemon: DaemonUnderFault) -> None:
        self.node, self.daemon = node, daemon


@pytest.fixture(scope="module")
def scene(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The daemon is started while its broker is down."""
    folder = tmp_path_factory.mktemp("broker-rows")
    with Node(folder / "node") as node:
        prepare_broker(node.amqp_url)
        node.settle_declared()
        node.kill()
        topology = f"patience_seconds = {_PATIENCE_SECONDS}"
        with daemon_under_fault(node.amqp_url, node.amqp_port, folder, models, topology=topology, wait=False) as daemon:
            yield Scene(node, daemon)


def test_row_01_broker_down_at_start(scene: Scene) -> None:
    """Without a broker the daemon backs off with jitter and says why; it consumes once the broker is there."""
    worker = scene.daemon.worker
    lines = 0
    for _ in range(4):
        wait = worker.wait_log("broker_unavailable", after=lines, logger="consumer", rank=0)
        lines = [json.loads(line)["timestamp"] for line in worker.lines()].index(wait["timestamp"]) + 1
    assert not scene.daemon.events("consuming")
    scene.node.start()
    worker.wait_log("consuming")
    waits = [line for line in scene.daemon.events("broker_unavailable") if line["rank"] == 0]
    assert len({line["retry_in_seconds"] for line in waits}) > 1, "no jitter"
    assert all(0 <= line["retry_in_seconds"] <= 1 for line in waits), "backoff_max_seconds"
    assert all("127.0.0.1" in line["reason"] for line in waits)
    assert not [line for line in worker.logs() if "exception" in line], "no traceback"
    scene.daemon.check_serves()


def test_row_02_broker_stopped_in_mid_job(scene: Scene) -> None:
    """A broker that is stopped in mid-job and started again: the job finishes meanwhile, and the redelivery finds its
    manifest."""
    _restart_in_mid_job(scene, kill=False)


def test_row_03_broker_killed_in_mid_job(scene: Scene) -> None:
    """The same with a broker that is killed."""
    _restart_in_mid_job(scene, kill=True)


def _restart_in_mid_job(scene: Scene, *, kill: bool) -> None:
    lines = len(scene.daemon.worker.lines())
    job_id = scene.daemon.publish_long()
    scene.node.restart(kill=kill)
    scene.daemon.worker.wait_log("connection_lost", after=lines, logger="consumer")
    scene.daemon.worker.wait_log("job_already_done", job_id=job_id)
    scene.daemon.check_done_once(job_id)


def test_row_08_alarm_holds_up_events_only(scene: Scene) -> None:
    """Under a memory alarm an ack still works, the job goes on, progress is dropped, and the terminal event waits for
    as long as the alarm lasts without the job being given up."""
    daemon, node = scene.daemon, scene.node
    # An ack that is on its way when the alarm begins gets through: the next job can only come after it.
    held = daemon.proxy.hold("Basic.Ack", TO_BROKER)
    first = daemon.publish(job())
    held.wait()
    parameters = {"seed": 1, "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 60}
    second = daemon.publish(job(parameters=parameters))
    lines = len(daemon.worker.lines())
    node.raise_memory_alarm()
    daemon.proxy.release(held)
    daemon.worker.wait_log("job_started", job_id=second)
    manifest = daemon.folder / "output" / second / "manifest.json"
    daemon.wait_for(manifest.exists)
    # Longer than confirm_timeout_seconds: a new connection would be blocked just the same.
    time.sleep(5)  # in which nothing comes
    assert daemon.ends(second) == []
    node.clear_memory_alarm()
    daemon.worker.wait_log("job_succeeded", job_id=second)
    daemon.check_done_once(second)
    daemon.check_done_once(first)
    assert len(daemon.ends(second)) == 1
    assert not daemon.events("connection_lost", after=lines)
    assert not daemon.events("stale_delivery", after=lines)
    assert daemon.progress(second) <= 2, "at most what was on its way when the alarm began, and the last one"


def test_row_09_consumer_timeout(scene: Scene) -> None:
    """When the broker's consumer_timeout takes a job away in mid-job, the daemon consumes again, and the manifest
    prevents a second run. Up to 4.2 the channel is closed, from 4.3 on the consumer cancelled and its channel left."""
    daemon, node = scene.daemon, scene.node
    node.set_consumer_timeout(seconds=1)
    lines = len(daemon.worker.lines())
    daemon.proxy.reset("consumer")  # a channel keeps the timeout it was opened with
    daemon.worker.wait_log("consuming", after=lines)
    try:
        lines = len(daemon.worker.lines())
        job_id = daemon.publish_long(steps=200)
        lost = daemon.worker.wait_log("connection_lost", after=lines, logger="consumer")
    finally:
        node.set_consumer_timeout(seconds=1800)
    assert "ChannelClosed" in lost["reason"] or "ConsumerCancelled" in lost["reason"]
    daemon.worker.wait_log("job_succeeded", job_id=job_id)
    daemon.worker.wait_log("job_already_done", job_id=job_id, redelivered=True)
    lines = len(daemon.worker.lines())
    daemon.proxy.reset("consumer")  # it came back before the timeout was a long one again
    daemon.worker.wait_log("consuming", after=lines)
    daemon.check_done_once(job_id)


def test_row_10_cancelled_consumer(scene: Scene) -> None:
    """A consumer that the broker cancels (its queue was deleted) consumes again on a new channel, once it can."""
    lines = len(scene.daemon.worker.lines())
    scene.node.delete_queue(TOPOLOGY.jobs_queue)
    lost = scene.daemon.worker.wait_log("connection_lost", after=lines, logger="consumer")
    assert "ConsumerCancelled" in lost["reason"]
    assert client.apply_on(BrokerConfig(url=scene.node.amqp_url), TOPOLOGY) == []
    scene.daemon.worker.wait_log("consuming", after=lines)
    scene.daemon.check_serves()


def test_row_11_deleted_queue_is_a_topology_error(scene: Scene) -> None:
    """A job queue that stays deleted is a topology error in the log and the heartbeat; the daemon is not ready, and
    ends with 78 when nobody mends it. It is never an idle zombie."""
    lines = len(scene.daemon.worker.lines())
    take(scene.node.amqp_url, AUDIT)
    scene.daemon.hear_heartbeats()
    scene.node.delete_queue(TOPOLOGY.jobs_queue)
    error = scene.daemon.worker.wait_log("topology_error", after=lines)
    assert f"queue {TOPOLOGY.jobs_queue}: missing" in error["reason"]
    assert scene.daemon.worker.process.wait(60) == 78
    beats = [json.loads(body)["data"]["consumer"] for _, body in take(scene.node.amqp_url, AUDIT)]
    assert any("topology error" in status and TOPOLOGY.jobs_queue in status for status in beats), beats
    assert beats[-1] != "consuming"
