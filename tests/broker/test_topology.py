"""Planning, applying and checking the topology on a real broker."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pika
import pytest

from daemon import client
from daemon.sections import BrokerConfig
from daemon.topology import Topology


def a_topology(**changes: object) -> Topology:
    values: dict[str, object] = {
        "prefix": "reeld",
        "pool": "tiny",
        "delivery_limit": 3,
        "retry_delays_seconds": (1, 10),
    }
    return Topology(**{**values, **changes})  # type: ignore[arg-type]  # a test's shorthand


def reeld_topology(word: str, config: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REELD_")}
    command = [sys.executable, "-m", "ops.cli", "topology", word, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=clean)


def write_config(folder: Path, url: str, *, delivery_limit: int = 3) -> Path:
    path = folder / "reeld.toml"
    path.write_text(
        f'pool = "tiny"\n[broker]\nurl = "{url}"\n[topology]\ndelivery_limit = {delivery_limit}\n'
        '[[models]]\nprofile = "tiny-t2v"\npath = "/nowhere"\n'
    )
    return path


def test_a_fresh_broker_lacks_everything_and_checking_creates_nothing(vhost: str) -> None:
    """Check names each object as missing, twice the same: it left nothing behind."""
    settings, topology = BrokerConfig(url=vhost), a_topology()
    first = client.check_on(settings, topology)
    names = {difference.name for difference in first}
    exchanges = {exchange.name for exchange in topology.exchanges()}
    assert names == exchanges | {queue.name for queue in topology.queues()}
    assert all(difference.text.startswith("- ") for difference in first)
    assert client.check_on(settings, topology) == first


def test_after_applying_nothing_differs_and_applying_again_changes_nothing(vhost: str) -> None:
    settings, topology = BrokerConfig(url=vhost), a_topology()
    assert client.apply_on(settings, topology) == []
    assert client.check_on(settings, topology) == []
    assert client.apply_on(settings, topology) == []


def test_a_job_that_is_refused_goes_to_the_dead_letter_queue(vhost: str) -> None:
    """The applied objects do together what they are for: a rejected delivery is dead-lettered."""
    settings, topology = BrokerConfig(url=vhost), a_topology()
    client.apply_on(settings, topology)
    client.publish_job(settings, pool="tiny", body=b"job", message_id="a")
    with closing(pika.BlockingConnection(pika.URLParameters(vhost))) as connection:
        channel = connection.channel()
        for method, _, _ in channel.consume(topology.jobs_queue, inactivity_timeout=10):
            assert method is not None
            channel.basic_reject(method.delivery_tag, requeue=False)
            break
        channel.cancel()
        for method, properties, body in channel.consume(topology.dead_queue, inactivity_timeout=10):
            assert method is not None
            assert body == b"job"
            assert properties.headers["x-death"][0]["reason"] == "rejected"
            break
        channel.cancel()


def test_a_ladder_queue_gives_its_message_back_to_the_job_queue(vhost: str) -> None:
    settings, topology = BrokerConfig(url=vhost), a_topology(retry_delays_seconds=(1,))
    client.apply_on(settings, topology)
    with closing(pika.BlockingConnection(pika.URLParameters(vhost))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish("", topology.retry_queue(1), b"again", mandatory=True)
        for method, _, body in channel.consume(topology.jobs_queue, inactivity_timeout=20):
            assert method is not None
            assert body == b"again"
            break
        channel.cancel()


def test_only_terminal_events_are_kept_when_nobody_listens(vhost: str) -> None:
    """Heartbeats and progress that nobody listens to are dropped: in the bounded queue they would push out the rest."""
    settings, topology = BrokerConfig(url=vhost), a_topology()
    client.apply_on(settings, topology)
    with closing(pika.BlockingConnection(pika.URLParameters(vhost))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for key in ("worker.w.heartbeat", "job.a.progress", "job.a.1.progress"):
            channel.basic_publish(topology.status_exchange, key, key.encode())
        for key in ("job.a.succeeded", "job.a.1.succeeded"):  # a job's id may have dots
            channel.basic_publish(topology.status_exchange, key, key.encode(), mandatory=True)
            assert channel.basic_get(topology.unrouted, auto_ack=True)[2] == key.encode()
        assert channel.basic_get(topology.unrouted, auto_ack=True)[0] is None


def test_every_queue_outlives_a_node_and_the_unrouted_are_bounded(vhost: str) -> None:
    """A classic queue lives on one node of a cluster: while that is away, each declare of it answers 404. The oldest of
    the kept last events makes room for the newest, and none is refused."""
    settings, topology = BrokerConfig(url=vhost), a_topology(unrouted_max_length=2)
    assert {queue.arguments.get("x-queue-type") for queue in topology.queues()} == {"quorum"}
    assert client.apply_on(settings, topology) == []
    assert client.check_on(settings, topology) == []
    with closing(pika.BlockingConnection(pika.URLParameters(vhost))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        keys = [f"job.{number}.succeeded" for number in range(5)]
        for key in keys:
            channel.basic_publish(topology.status_exchange, key, key.encode(), mandatory=True)
        kept = []
        while (got := channel.basic_get(topology.unrouted, auto_ack=True))[0] is not None:
            kept.append(got[2].decode())
    assert kept == keys[-2:]


def test_a_queue_that_differs_is_named_with_both_values_and_left_alone(vhost: str) -> None:
    """Apply never deletes: the queue keeps its argument, and everything else is declared."""
    settings = BrokerConfig(url=vhost)
    client.apply_on(settings, a_topology(delivery_limit=5))
    wanted = a_topology(delivery_limit=3)
    for differences in (client.check_on(settings, wanted), client.apply_on(settings, wanted)):
        assert [difference.name for difference in differences] == ["reeld.jobs.tiny"]
        assert differences[0].text.startswith("~ queue reeld.jobs.tiny: 406")
        assert "'x-delivery-limit'" in differences[0].text
        assert "'3'" in differences[0].text
        assert "'5'" in differences[0].text
    assert client.check_on(settings, a_topology(delivery_limit=5)) == []


def test_an_exchange_of_another_kind_differs(vhost: str) -> None:
    with closing(pika.BlockingConnection(pika.URLParameters(vhost))) as connection:
        connection.channel().exchange_declare("reeld.status", "fanout", durable=True)
    differences = client.check_on(BrokerConfig(url=vhost), a_topology())
    assert any(difference.text.startswith("~ exchange reeld.status: 406") for difference in differences)


def test_one_missing_queue_is_found_and_mended(vhost: str) -> None:
    settings, topology = BrokerConfig(url=vhost), a_topology()
    client.apply_on(settings, topology)
    with closing(pika.BlockingConnection(pika.URLParameters(vhost))) as connection:
        connection.channel().queue_delete(topology.dead_queue)
    assert [difference.name for difference in client.check_on(settings, topology)] == [topology.dead_queue]
    assert client.apply_on(settings, topology) == []
    assert client.check_on(settings, topology) == []


def test_pools_share_exchanges_and_nothing_else(vhost: str) -> None:
    """A second pool is added without touching the first."""
    settings = BrokerConfig(url=vhost)
    assert client.apply_on(settings, a_topology()) == []
    assert client.apply_on(settings, a_topology(pool="other", delivery_limit=9)) == []
    assert client.check_on(settings, a_topology()) == []


def test_deleting_takes_everything_away(vhost: str) -> None:
    settings, topology = BrokerConfig(url=vhost), a_topology()
    client.apply_on(settings, topology)
    client.delete_on(settings, topology)
    assert len(client.check_on(settings, topology)) == len(topology.exchanges()) + len(topology.queues())


@pytest.mark.parametrize("word", ["apply", "check"])
def test_the_command_ends_with_78_and_prints_the_difference(word: str, vhost: str, tmp_path: Path) -> None:
    settings = BrokerConfig(url=vhost)
    client.apply_on(settings, a_topology(delivery_limit=5, retry_delays_seconds=(10, 60, 300)))
    done = reeld_topology(word, write_config(tmp_path, vhost))
    assert done.returncode == 78
    assert "~ queue reeld.jobs.tiny: 406" in done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_the_command_applies_and_then_finds_everything_as_planned(vhost: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, vhost)
    assert reeld_topology("check", config).returncode == 78
    assert reeld_topology("apply", config).returncode == 0
    done = reeld_topology("check", config)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("as planned")
