"""Rows 11, 12 and 13 once more, for a worker that has served: its ranks start anew while the broker refuses them.

At the first start a refusal is final, because somebody must correct the configuration. Later it may be a password that
is being changed, an authentication backend or a cluster's node that is away, and a worker must not leave for good
because a rank died in that very moment.
"""

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from daemon import client
from daemon.sections import BrokerConfig
from ops.private_broker import PrivateBroker
from tests.broker.daemon_under_fault import TOPOLOGY, DaemonUnderFault, daemon_under_fault, prepare_broker
from tests.node import api

_PATIENCE_SECONDS = 20


@pytest.fixture
def user(broker: PrivateBroker, vhost: str) -> Iterator[str]:
    """The URL of a user of the worker's own."""
    name = f"worker-{secrets.token_hex(4)}"
    set_password(broker, name, "secret")
    permissions = dict.fromkeys(("configure", "write", "read"), ".*")
    api(broker, "PUT", f"/permissions/{vhost.rpartition('/')[2]}/{name}", permissions)
    yield vhost.replace("guest:guest", f"{name}:secret")
    api(broker, "DELETE", f"/users/{name}")


def set_password(broker: PrivateBroker, name: str, password: str) -> None:
    api(broker, "PUT", f"/users/{name}", {"password": password, "tags": ""})


def _kill_rank0(daemon: DaemonUnderFault) -> int:
    """Returns the number of the first line that tells of the group after it."""
    lines = len(daemon.worker.lines())
    os.kill(daemon.rank0(), signal.SIGKILL)
    daemon.worker.wait_log("group_failed", after=lines)
    return lines


def test_a_group_after_the_first_waits_out_a_refusal(
    broker: PrivateBroker, vhost: str, user: str, models: Path, tmp_path: Path
) -> None:
    """Refused credentials are tried again, a missing queue is waited for, and with both mended the next job is done; a
    queue that nobody mends ends the worker with 78, after the same patience as ever."""
    prepare_broker(vhost)
    name = user.partition("//")[2].partition(":")[0]
    patience = f"patience_seconds = {_PATIENCE_SECONDS}"
    with daemon_under_fault(user, broker.amqp_port, tmp_path, models, topology=patience) as daemon:
        set_password(broker, name, "changed")
        lines = _kill_rank0(daemon)
        waits = daemon.worker.wait_log("broker_unavailable", after=lines, logger="consumer")
        assert "refused the user or the password" in waits["reason"]
        set_password(broker, name, "secret")
        daemon.worker.wait_log("consuming", after=lines)
        daemon.check_serves()

        _delete_jobs_queue(vhost)
        lines = _kill_rank0(daemon)
        daemon.worker.wait_log("ready", after=lines)
        daemon.worker.wait_log("topology_error", after=_number_of(daemon, "ready", lines))
        assert client.apply_on(BrokerConfig(url=vhost), TOPOLOGY) == []
        daemon.worker.wait_log("consuming", after=lines)
        daemon.check_serves()

        _delete_jobs_queue(vhost)
        _kill_rank0(daemon)
        assert daemon.worker.process.wait(_PATIENCE_SECONDS + 90) == 78


def test_a_group_after_the_first_waits_out_a_model_that_is_away(
    broker: PrivateBroker, vhost: str, models: Path, tmp_path: Path
) -> None:
    """A file server that is away when a rank dies is no wrong configuration: the worker is there when it is back."""
    prepare_broker(vhost)
    mount = tmp_path / "mount"
    mount.symlink_to(models)
    with daemon_under_fault(vhost, broker.amqp_port, tmp_path, mount) as daemon:
        mount.rename(tmp_path / "away")
        lines = _kill_rank0(daemon)
        fatal = daemon.worker.wait_log("fatal", after=lines)
        assert "no such folder" in fatal["reason"]
        assert fatal["exit_status"] == 1
        (tmp_path / "away").rename(mount)
        daemon.worker.wait_log("consuming", after=lines)
        daemon.check_serves()


def _delete_jobs_queue(url: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        connection.channel().queue_delete(TOPOLOGY.jobs_queue)


def _number_of(daemon: DaemonUnderFault, event: str, after: int) -> int:
    """Of the first line from number `after` on with this event."""
    return next(n for n, line in enumerate(daemon.worker.logs()) if n >= after and line["event"] == event)
