"""Row 22 of the fault matrix: a disk that is full. A real one: a small tmpfs that only the daemon has mounted.

And a work directory that hangs, as on a file server that is away: a named pipe in the place of a file. There is no
object storage to be down: videos stay on the worker's disk, or what is mounted there.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import client
from daemon.sections import BrokerConfig
from ops.private_broker import PrivateBroker
from tests.broker.daemon_under_fault import DaemonUnderFault, daemon_config, daemon_under_fault, prepare_broker
from tests.harness import Worker, fresh_vhost, job
from tests.proxy import Proxy

_WITH_SMALL_DISK = 'mkdir -p "$1"; mount -t tmpfs -o size=1m tmpfs "$1"; shift; exec "$@"'


@pytest.fixture
def daemon(broker: PrivateBroker, models: Path, tmp_path: Path) -> Iterator[DaemonUnderFault]:
    """A daemon whose output directory is a disk of 1 MiB."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    reeld = str(Path(sys.executable).parent / "reeld")
    config = daemon_config(tmp_path, models)
    enter = ["unshare", "--mount", *user, "sh", "-euc", _WITH_SMALL_DISK, "sh", str(tmp_path / "output")]
    with fresh_vhost(broker) as url, Proxy(broker.amqp_port) as proxy:
        prepare_broker(url)
        command = [*enter, reeld, "run", "--config", str(config)]
        worker = Worker(config, proxy.through(url), tmp_path, command=command)
        try:
            worker.wait_log("consuming")
            yield DaemonUnderFault(worker, proxy, url, tmp_path)
        finally:
            worker.end()


def test_row_22_full_disk(daemon: DaemonUnderFault) -> None:
    """With no space left a job is tried again in place, unacked, then over the ladder; nothing half-written is visible
    meanwhile, and it succeeds once there is room."""
    output = Path(f"/proc/{daemon.worker.process.pid}/root{daemon.folder}/output")
    filler = output / "filler"
    _fill(filler)
    job_id = daemon.publish(job())
    retried = daemon.worker.wait_log("retrying_in_place", job_id=job_id)
    assert retried["code"] == "storage_unavailable"
    assert "No space left on device" in retried["reason"]
    daemon.worker.wait_log("job_retried_later", job_id=job_id, code="storage_unavailable")
    visible = [path.name for path in output.iterdir() if not path.name.startswith(".")]
    assert visible == ["filler"], "no folder, video or manifest of the job"
    assert not list(output.rglob("*.part")), "what was begun is removed"
    filler.unlink()
    daemon.worker.wait_log("job_succeeded", job_id=job_id)
    assert [name for name, _ in daemon.ends(job_id)] == ["succeeded"]
    assert sorted(path.suffix for path in (output / job_id).iterdir()) == [".json", ".mp4"]


def test_a_hung_work_directory_holds_up_no_ack(broker: PrivateBroker, models: Path, tmp_path: Path) -> None:
    """A cancel that cannot be written down counts at once and jobs go on; it is answered only once it is written, for
    the answer says how long it is remembered."""
    with fresh_vhost(broker) as url:
        prepare_broker(url)
        with daemon_under_fault(url, broker.amqp_port, tmp_path, models) as daemon:
            file = tmp_path / "work" / "tester.cancelled.jsonl"
            os.mkfifo(file)
            cancelled = job()
            client.tell_workers(BrokerConfig(url=url), f"cancel.{cancelled['job_id']}")
            daemon.publish(cancelled)
            daemon.worker.wait_log("job_cancelled", job_id=cancelled["job_id"])
            daemon.check_serves()
            daemon.check_serves()
            assert daemon.events("cancel_noted") == []
            with file.open() as reader:
                assert cancelled["job_id"] in reader.readline()
                daemon.worker.wait_log("cancel_noted", job_id=cancelled["job_id"])


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_a_storage_that_hangs_is_a_stall(broker: PrivateBroker, models: Path, tmp_path: Path) -> None:
    """A manifest that can be opened and never read: not ready for ever, but a group that starts again, until it can."""
    message = job()
    manifest = tmp_path / "output" / message["job_id"] / "manifest.json"
    manifest.parent.mkdir(parents=True)
    os.mkfifo(manifest)
    with fresh_vhost(broker) as url:
        prepare_broker(url)
        config = daemon_config(tmp_path, models)
        config.write_text(config.read_text() + "[stall]\nstage_seconds = 3\n")
        with Proxy(broker.amqp_port) as proxy:
            worker = Worker(config, proxy.through(url), tmp_path)
            try:
                worker.wait_log("consuming")
                daemon = DaemonUnderFault(worker, proxy, url, tmp_path)
                daemon.publish(message)
                stalled = worker.wait_log("stalled")
                assert (stalled["phase"], stalled["job_id"]) == ("stage", message["job_id"])
                manifest.unlink()
                worker.wait_log("job_succeeded", job_id=message["job_id"])
            finally:
                worker.end()
