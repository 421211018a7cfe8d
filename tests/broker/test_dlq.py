"""Dead letters on a real broker: looked at without loss, requeued with their reason, dropped, and asked about."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import pika
import pytest

from daemon import client
from daemon.cancellations import Cancellations
from daemon.consumer import Consumer
from daemon.copies import REQUEUED_HEADER
from daemon.dead_letters import DeadLetterQueue
from daemon.delivery import ATTEMPT_HEADER
from daemon.errors import ConfigError, PermanentJobError, PublishError
from daemon.job import parse_job_message
from daemon.publisher import Publisher
from daemon.reporter import TIME_HEADER, Reporter
from daemon.sections import BrokerConfig
from daemon.settlement import Settlement
from daemon.topology import Topology
from ops import dlq
from ops.dlq import Filters
from ops.failure import CommandFailedError, UsageError

POOL = "tiny"
TOPOLOGY = Topology(prefix="reeld", pool=POOL, delivery_limit=3, retry_delays_seconds=(10,), max_length=400)


@pytest.fixture
def settings(vhost: str) -> BrokerConfig:
    settings = BrokerConfig(url=vhost)
    assert client.apply_on(settings, TOPOLOGY) == []
    return settings


def bury(settings: BrokerConfig, *letters: dict[str, Any]) -> None:
    """Puts letters among the dead as a worker does; waits until the broker shows them. Each: job_id, code, headers."""
    with closing(pika.BlockingConnection(pika.URLParameters(settings.url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for letter in letters:
            headers = {"x-reeld-code": letter["code"], "x-reeld-message": f"why {letter['job_id']}"}
            headers |= {"x-reeld-job-id": letter["job_id"], **letter.get("headers", {})}
            properties = pika.BasicProperties(message_id=letter["job_id"], headers=headers, delivery_mode=2)
            body = json.dumps({"job_id": letter["job_id"]}).encode()
            channel.basic_publish(TOPOLOGY.dead_exchange, POOL, body, properties, mandatory=True)
        deadline = time.monotonic() + 10
        while channel.queue_declare(TOPOLOGY.dead_queue, passive=True).method.message_count < len(letters):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def dead(settings: BrokerConfig) -> list[str | None]:
    with DeadLetterQueue(settings, POOL) as queue:
        return [letter.job_id for letter in queue]


def jobs(settings: BrokerConfig, count: int) -> list[tuple[Any, bytes]]:
    """What is in the job queue, acked; waits for `count`."""
    taken: list[tuple[Any, bytes]] = []
    with closing(pika.BlockingConnection(pika.URLParameters(settings.url))) as connection:
        channel = connection.channel()
        deadline = time.monotonic() + 10
        while len(taken) < count and time.monotonic() < deadline:
            method, properties, body = channel.basic_get(TOPOLOGY.jobs_queue, auto_ack=True)
            if method is not None:
                taken.append((properties, body))
    return taken


def reeld(settings: BrokerConfig, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "ops.cli", *arguments, "--url", settings.url, "--pool", POOL]


def test_looking_at_letters_loses_none_and_keeps_their_order(settings: BrokerConfig) -> None:
    """25 looks, each of which the broker counts as a delivery: more than its default limit of 20. Half of the looks
    stop in the middle."""
    names = [f"job-{number}" for number in range(5)]
    bury(settings, *({"job_id": name, "code": "internal"} for name in names))
    for look in range(25):
        with DeadLetterQueue(settings, POOL) as queue:
            limit = None if look % 2 else 3
            assert len(list(dlq._matching(queue, Filters(limit=limit)))) == (limit or 5)
    assert dead(settings) == names


def test_requeueing_starts_over_and_keeps_the_reason(
    settings: BrokerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job is as its publisher made it, but for what it failed of; a second failure adds to that."""
    own = {"traceparent": "00-1-2-03"}
    died = {TIME_HEADER: "2026-01-02T03:04:05Z", "x-reeld-worker": "box", ATTEMPT_HEADER: 4, "x-death": [{"count": 1}]}
    bury(
        settings,
        {"job_id": "a", "code": "storage_unavailable", "headers": {**own, **died}},
        {"job_id": "b", "code": "malformed_job"},
        {"job_id": "c", "code": "storage_unavailable"},
    )
    dlq.requeue(settings, POOL, Filters(codes=("storage_unavailable",)), yes=True)
    assert capsys.readouterr().out.splitlines()[-1] == "2 requeued"
    assert dead(settings) == ["b"]
    (first, body), (second, _) = jobs(settings, 2)
    assert (first.message_id, second.message_id, json.loads(body)) == ("a", "c", {"job_id": "a"})
    assert first.delivery_mode == 2
    reason = first.headers.pop(REQUEUED_HEADER)
    assert {name: value for name, value in first.headers.items() if name != "x-delivery-count"} == own
    assert reason == [
        {
            "code": "storage_unavailable",
            "message": "why a",
            "path": "",
            "worker": "box",
            "died_at": "2026-01-02T03:04:05Z",
        }
    ]
    bury(settings, {"job_id": "a", "code": "internal", "headers": {REQUEUED_HEADER: reason}})
    dlq.requeue(settings, POOL, Filters(job_ids=("a",)), yes=True)
    ((again, _),) = jobs(settings, 1)
    assert [each["code"] for each in again.headers[REQUEUED_HEADER]] == ["storage_unavailable", "internal"]


def test_a_letter_that_the_broker_made_is_requeued_as_well(settings: BrokerConfig) -> None:
    """Past its delivery limit a job is dead-lettered by the broker, with x-death instead of our reason."""
    client.publish_job(settings, pool=POOL, body=b'{"job_id": "deadly"}', message_id="deadly")
    with closing(pika.BlockingConnection(pika.URLParameters(settings.url))) as connection:
        channel = connection.channel()
        for method, _, _ in channel.consume(TOPOLOGY.jobs_queue, inactivity_timeout=2):
            if method is None:
                break
            channel.basic_reject(method.delivery_tag, requeue=True)
        channel.cancel()
    with DeadLetterQueue(settings, POOL) as queue:
        (letter,) = list(queue)
    assert (letter.job_id, letter.code) == ("deadly", "worker_lost")
    assert letter.died_at is not None
    assert abs(letter.died_at - time.time()) < 60
    dlq.requeue(settings, POOL, Filters(job_ids=("deadly",)), yes=True)
    ((properties, _),) = jobs(settings, 1)
    assert "x-death" not in properties.headers
    assert properties.headers[REQUEUED_HEADER][0]["code"] == "worker_lost"


def test_a_full_queue_leaves_the_letters_where_they_are(
    settings: BrokerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the broker refuses stays a dead letter, in its place, and the command says how far it came."""
    small = Topology(prefix="small", pool=POOL, delivery_limit=3, retry_delays_seconds=(10,), max_length=1)
    settings = settings.model_copy(update={"prefix": "small"})
    assert client.apply_on(settings, small) == []
    with closing(pika.BlockingConnection(pika.URLParameters(settings.url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for name in ("a", "b", "c", "d", "e"):
            channel.basic_publish(
                "small.dead", POOL, name.encode(), pika.BasicProperties(message_id=name), mandatory=True
            )
    with pytest.raises(PublishError, match="queue full"):
        dlq.requeue(settings, POOL, Filters(limit=5), yes=True)
    done = int(capsys.readouterr().err.split()[1])
    assert 1 <= done < 5  # a quorum queue notices its limit a message late
    assert dead(settings) == ["a", "b", "c", "d", "e"][done:]


def test_killed_in_the_middle_of_requeueing_nothing_is_lost(settings: BrokerConfig) -> None:
    """kill -9 after some letters: each job is in the pool or still a dead letter, and one at most is both."""
    names = [f"job-{number:03}" for number in range(200)]
    bury(settings, *({"job_id": name, "code": "internal"} for name in names))
    with subprocess.Popen(
        reeld(settings, "dlq", "requeue", "--all", "--yes"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline().startswith("requeued job-")
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    left: list[str | None] = []
    back: list[str] = []
    while len(left) + len(back) < len(names) and time.monotonic() < deadline:
        left = dead(settings)  # the broker gives letters back once it notices that the connection is gone
        back += [properties.message_id for properties, _ in jobs(settings, len(names) - len(left) - len(back))]
    assert set(left) | set(back) == set(names)
    assert 5 <= len(back) < len(names)
    assert len(left) + len(back) <= len(names) + 1
    assert left == sorted(left, key=str), "in their order"


def test_dropping_takes_the_matching_letters_only(settings: BrokerConfig) -> None:
    old = {TIME_HEADER: "2026-01-02T03:04:05Z"}
    bury(
        settings,
        {"job_id": "old", "code": "internal", "headers": old},
        {"job_id": "other", "code": "expired", "headers": old},
        {"job_id": "ageless", "code": "internal"},
    )
    dlq.drop(settings, POOL, Filters(codes=("internal",), older_than_seconds=3600), yes=True)
    assert dead(settings) == ["other", "ageless"]
    with pytest.raises(CommandFailedError, match="no dead letter matches"):
        dlq.drop(settings, POOL, Filters(job_ids=("old",)), yes=True)
    with pytest.raises(UsageError, match="--yes"):
        dlq.drop(settings, POOL, Filters(limit=1), yes=False)
    with pytest.raises(ConfigError, match=r"reeld\.jobs\.nobody\.dead does not exist"):
        dlq.drop(settings, "nobody", Filters(limit=1), yes=True)
    assert dead(settings) == ["other", "ageless"]


def test_list_and_show_for_people_and_for_programs(settings: BrokerConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Text is shown as it is, not as markup, and into a pipe in whole lines; JSON holds what the table does; `show` has
    the whole job."""
    bury(settings, {"job_id": "a", "code": "internal", "headers": {"x-reeld-message": "[red]no[/] luck"}})
    dlq.list_letters(settings, POOL, Filters(), as_json=False)
    assert "[red]no[/] luck" in capsys.readouterr().out
    dlq.list_letters(settings, POOL, Filters(), as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["job_id"], row["code"], row["message"]) == ("a", "internal", "[red]no[/] luck")
    dlq.show_letters(settings, POOL, Filters(), as_json=True)
    (whole,) = json.loads(capsys.readouterr().out)
    assert whole["body"] == {"job_id": "a"}
    dlq.show_letters(settings, POOL, Filters(), as_json=False)
    assert "[red]no[/] luck" in capsys.readouterr().out
    dlq.list_letters(settings, POOL, Filters(codes=("expired",)), as_json=True)
    assert json.loads(capsys.readouterr().out) == []
    bury(settings, {"job_id": "01a2249e-b457-7fa0-9c1a-0123456789ab", "code": "storage_unavailable", "headers": {}})
    dlq.list_letters(settings, POOL, Filters(), as_json=False)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "storage_unavailable" in line)
    assert "01a2249e-b457-7fa0-9c1a-0123456789ab" in line
    assert "why 01a2249e-b457-7fa0-9c1a-0123456789ab" in line


@pytest.mark.parametrize(("answer", "left"), [("n", 2), ("y", 0)])
def test_on_a_terminal_it_asks(settings: BrokerConfig, answer: str, left: int) -> None:
    """The letters that are meant are shown first; only a yes drops them."""
    bury(settings, {"job_id": "a", "code": "internal"}, {"job_id": "b", "code": "internal"})
    parent, child = pty.openpty()
    process = subprocess.Popen(reeld(settings, "dlq", "drop", "--all"), stdin=child, stdout=child, stderr=child)
    os.close(child)
    seen = b""
    while b"[y/N]" not in seen:
        assert select.select([parent], [], [], 30)[0], seen
        seen += os.read(parent, 4096)
    assert b"why a" in seen
    assert b"drop 2 of pool tiny?" in seen
    os.write(parent, answer.encode() + b"\n")
    assert process.wait(30) == (1 if left else 0)
    os.close(parent)
    assert len(dead(settings)) == left


def test_mistakes_of_the_command_line(settings: BrokerConfig) -> None:
    """No filter, no pool, no such unit of time or code: usage, with what to give instead."""

    def fails(*arguments: str) -> str:
        command = [sys.executable, "-m", "ops.cli", "dlq", *arguments]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("REELD_")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "--all" in fails("drop", "--pool", POOL, "--yes")
    assert "--pool" in fails("list")
    assert "2h" in fails("list", "--pool", POOL, "--older-than", "yesterday")
    assert "malformed_job" in fails("list", "--pool", POOL, "--code", "malformed")


def test_two_jobs_of_one_name_are_two_letters(settings: BrokerConfig) -> None:
    """What was agreed to is known by its whole content, not by the job's name."""
    name = str(uuid.uuid4())
    bury(settings, {"job_id": name, "code": "internal"}, {"job_id": name, "code": "expired"})
    with DeadLetterQueue(settings, POOL) as queue:
        first, second = list(queue)
    with DeadLetterQueue(settings, POOL) as queue:
        again = list(queue)
    assert first.key != second.key
    assert [letter.key for letter in again] == [first.key, second.key]


def test_an_oversized_body_is_not_read_for_its_id_either(settings: BrokerConfig, tmp_path: Path) -> None:
    """Parsing a hostile one costs many times its size: it is dead-lettered under its message_id, or without an id. A
    malformed one within the limit goes by the id that it meant."""
    publisher = Publisher(settings, worker_id="w")
    consumer = Consumer(settings, TOPOLOGY, worker_id="w", prepare=lambda _: None, on_control=lambda _: None)
    settlement = Settlement(
        consumer,
        Reporter(publisher, TOPOLOGY, worker_id="w"),
        retry_delays_seconds=(10,),
        pause=lambda _seconds, _job_id: None,
        cancellations=Cancellations(tmp_path / "cancelled.jsonl", memory_seconds=60),
    )
    publisher.start()
    consumer.start()
    large = b'{"job_id": "inside", "prompt": "' + b"x" * 2000 + b'"}'
    for body, message_id in ((large, "outside"), (large, "no job's id"), (b'{"job_id": "inside"}', "outside")):
        client.publish_job(settings, pool=POOL, body=body, message_id=message_id)
        delivery = consumer.deliveries.get(timeout=20)
        assert delivery is not None
        with pytest.raises(PermanentJobError) as refused:
            parse_job_message(delivery.body, max_body_bytes=1024)
        settlement.fail_malformed(delivery, refused.value)
    consumer.stop()
    publisher.stop()
    with DeadLetterQueue(settings, POOL) as queue:
        assert [letter.headers.get("x-reeld-job-id") for letter in queue] == ["outside", None, "inside"]


def test_a_large_letter_without_a_noted_id_goes_by_its_message_id(settings: BrokerConfig) -> None:
    """The broker notes no job's id; the body is looked into for one up to 1 MiB."""
    small, large = b'{"job_id": "inside"}', b'{"job_id": "inside", "prompt": "' + b"x" * (1 << 20) + b'"}'
    with closing(pika.BlockingConnection(pika.URLParameters(settings.url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for body in (small, large):
            properties = pika.BasicProperties(message_id="outside", delivery_mode=2)
            channel.basic_publish(TOPOLOGY.dead_exchange, POOL, body, properties, mandatory=True)
    assert dead(settings) == ["inside", "outside"]
