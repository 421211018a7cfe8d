"""Fuzzing of the edge: whatever arrives ends as a valid job, or as a dead letter with a code; nothing else happens.

`make test` sends 500 messages, `make fuzz` 10,000 and more (FUZZ_EXAMPLES). A message that the broker itself refuses
counts as sent: it never gets to a daemon.
"""

import base64
import contextlib
import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ops.private_broker import PrivateBroker
from tests.amqp_properties import Properties, array, long_string, nested, properties, table
from tests.harness import Ear as HarnessEar
from tests.harness import Worker, fresh_vhost, idle, write_config
from tests.unit.job_bodies import FULL, JSON_VALUES, LEAST, mutated_bodies

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
_PATIENCE_SECONDS = 30.0
GOOD = {**LEAST, "job_id": "job-1"}
_BAD_EVENTS = ("connection_lost", "log_failed", "settle_failed", "publish_failed")


class Edge:
    """A running daemon that does not generate, a publisher of raw messages, and an ear for what becomes of them."""

    def __init__(self, worker: Worker, url: str) -> None:
        self.worker, self._url = worker, url
        self.jobs = self.letters = 0
        self.refused: Counter[str] = Counter()
        self._got: list[tuple[str, Any, bytes]] = []
        self._log_at = 0
        self._listening = pika.BlockingConnection(pika.URLParameters(url))
        channel = self._listening.channel()
        queue = channel.queue_declare("", exclusive=True).method.queue
        for name in ("succeeded", "failed", "cancelled"):
            channel.queue_bind(queue, "reeld.status", f"job.*.{name}")
            channel.queue_bind(queue, "reeld.status", f"job.#.{name}")
        channel.basic_consume(queue, self._on_event, auto_ack=True)
        channel.basic_consume("reeld.jobs.test.dead", self._on_letter, auto_ack=True)
        self._sending: Any = None

    def send(self, body: bytes, raw: Properties) -> bool:
        """Publishes, mandatory and confirmed. False when the broker refused it."""
        try:
            if self._sending is None or not self._sending.is_open:
                self._sending = pika.BlockingConnection(pika.URLParameters(self._url)).channel()
                self._sending.confirm_delivery()
            self._sending.basic_publish("reeld.jobs", "test", body, raw.for_pika(), mandatory=True)
        except pika.exceptions.AMQPError as error:
            with contextlib.suppress(pika.exceptions.AMQPError):
                self._sending.connection.close()
            self._sending = None
            self.refused[re.sub(r"[\d<'{].*", "", str(getattr(error, "reply_text", repr(error))))[:60]] += 1
            return False
        return True

    def judge(self, body: bytes, raw: Properties) -> None:
        """Waits for the end of the message just sent, and fails when it is any other than the two allowed."""
        letter = self._next("letter", "cancelled")
        kind, told, content = letter
        if kind == "cancelled":
            self.jobs += 1
            return
        self.letters += 1
        assert content == body, "the dead letter is the message as it was"
        headers = told.headers
        assert headers["x-reeld-code"], headers
        assert told.message_id == raw.message_id
        assert not {"CC", "BCC", "x-death"} & headers.keys(), "headers that make the broker act"
        job_id = headers.get("x-reeld-job-id")
        if job_id is not None:
            kind, event, _ = self._next("failed")
            assert event["subject"] == job_id
            assert event["data"]["code"] == headers["x-reeld-code"]
            assert event["data"]["path"] == (headers["x-reeld-path"] or None)

    def check_health(self) -> None:
        """The same process, the same connections, and no line in its log that tells of an exception."""
        assert self.worker.process.poll() is None, self.worker.tail()
        with self.worker.log_path.open("rb") as log:
            log.seek(self._log_at)
            new = log.read()
        whole, _, _ = new.rpartition(b"\n")
        self._log_at += len(whole)
        for line in whole.splitlines():
            if line:
                record = json.loads(line)
                assert "exception" not in record, record
                assert record["level"] != "critical", record
                assert record["event"] not in ("connection_lost", "log_failed", "settle_failed", "publish_failed"), (
                    record
                )

    def close(self) -> None:
        assert self._got == [], "nothing else happened"
        for connection in (self._listening, self._sending.connection if self._sending else None):
            if connection is not None and connection.is_open:
                connection.close()

    def _next(self, *kinds: str) -> tuple[str, Any, bytes]:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._got:
            assert time.monotonic() < deadline, f"neither of {kinds} came\n{self.worker.tail()}"
            assert self.worker.process.poll() is None, self.worker.tail()
            self._listening.process_data_events(time_limit=1)
        first = self._got.pop(0)
        assert first[0] in kinds, first
        return first

    def _on_event(self, _channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        self._got.append((method.routing_key.rpartition(".")[2], json.loads(body), body))

    def _on_letter(self, _channel: Any, _method: Any, told: Any, body: bytes) -> None:
        self._got.append(("letter", told, body))


@pytest.fixture(scope="module")
def edge(broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = tmp_path_factory.mktemp("edge")
    config = write_config(folder, models, nproc=1)
    config.write_text(config.read_text().replace('schemes = ["file"]', 'schemes = ["data"]'))
    with fresh_vhost(broker) as url:
        ear = HarnessEar(url)
        worker = Worker(config, url, folder, command=[sys.executable, "-m", "tests.edge"])
        try:
            ear.wait(idle, worker=worker)
            running = Edge(worker, url)
            yield running
            running.close()
            print(f"edge: {running.jobs} jobs, {running.letters} dead letters; the broker refused {running.refused}")
        finally:
            worker.end()
            ear.close()


def _png() -> str:
    data = io.BytesIO()
    Image.new("RGB", (32, 16), "teal").save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


TINY_PNG = _png()
BODIES = st.one_of(
    st.just(json.dumps(GOOD).encode()),
    mutated_bodies(),
    st.binary(max_size=300),
    JSON_VALUES.map(lambda value: json.dumps(value).encode()),
    st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "utf-7"]).map(lambda name: json.dumps(GOOD).encode(name)),
    st.sampled_from([TINY_PNG, TINY_PNG[:-9], "data:,", "data:image/png;base64,AAAA", "file:///etc/passwd"]).map(
        lambda uri: json.dumps({**FULL, "inputs": {"input_image": uri}}).encode()
    ),
    st.integers(1_000_000, 3_000_000).map(lambda size: b'{"prompt": "' + b"x" * size + b'"}'),
)
BODY = json.dumps(GOOD).encode()
LATE = b"T" + (2**63).to_bytes(8, "big")


@given(body=BODIES, raw=properties())
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # a daemon that a message has broken is no place to shrink it
    report_multiple_bugs=False,
)
@example(body=BODY, raw=Properties())
@example(body=BODY, raw=Properties(headers=table({b"late": LATE})))
@example(body=BODY, raw=Properties(headers=table({b"deep": nested(9000, arrays=True)})))
@example(body=BODY, raw=Properties(headers=table({b"deep": nested(9000, arrays=False)})))
@example(body=BODY, raw=Properties(headers=table({b"\xff": b"V"})))
@example(body=b"{}", raw=Properties(headers=table({b"\xff": b"V"})))
@example(body=b"{}", raw=Properties(headers=table({b"half": b"d" + b"\x3f\xe0" + b"\0" * 6})))
@example(body=b"{}", raw=Properties(headers=table({b"big": long_string("\U0001f98a".encode() * 31_000)})))
@example(body=b"{}", raw=Properties(headers=table({b"CC": array(long_string(b"test"), long_string(b"elsewhere"))})))
@example(body=b"{}", raw=Properties(strings={"message_id": b"\xff", "correlation_id": b"\xff", "reply_to": b"\xff"}))
@example(body=BODY, raw=Properties(strings={"correlation_id": b"\xff", "reply_to": b"\xff"}))
@example(body=BODY, raw=Properties(strings={"content_type": b"\xff", "content_encoding": b"gzip", "type": b"\xff"}))
@pytest.mark.timeout(3600)
def test_every_message_is_a_job_or_a_dead_letter_with_a_code(edge: Edge, body: bytes, raw: Properties) -> None:
    """Any body under any properties ends in one of the two ways, and the daemon is as it was."""
    if edge.send(body, raw):
        edge.judge(body, raw)
    edge.check_health()
