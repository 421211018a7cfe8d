"""Row 22 of the fault matrix: a disk that is full. A real one: a small tmpfs that only the daemon has mounted.

There is no object storage to be down: videos stay on the worker's disk, or what is mounted there.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.private_broker import PrivateBroker
from tests.broker.daemon_under_fault import DaemonUnderFault, daemon_config, prepare_broker
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


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
