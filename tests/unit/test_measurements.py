"""Measurements on their way from a rank through the pipe into the launcher's metrics."""

import os
from pathlib import Path

import pytest

from daemon.config import Config
from daemon.errors import ErrorCode
from daemon.measurements import PIPE_FILE, Measurements
from daemon.metrics import Metrics
from daemon.vitals import Vitals

CONFIG = Config.model_validate({"models": [{"profile": "tiny-t2v", "path": "/models/tiny-t2v"}]})


def _lines(metrics: Metrics) -> set[str]:
    return set(metrics.render(None)[0].decode().splitlines())


def test_everything_a_rank_tells_is_counted(tmp_path: Path) -> None:
    """Each measurement has its metric, with the labels that it names; what is told before the end is there."""
    metrics = Metrics(CONFIG, Vitals(CONFIG, 1), tmp_path, world_size=1)
    with metrics:
        told = Measurements(tmp_path)
        told.job_ended("failed", ErrorCode.OUT_OF_MEMORY)
        told.job_accepted(queue_wait_seconds=3.0, redelivered=True)
        told.job_repeated()
        told.job_retried("ladder", ErrorCode.INPUT_UNAVAILABLE)
        told.job_requeued()
        told.job_seconds(9.0)
        told.phase("decode", 0.2)
        told.step(1.5)
        told.model_loaded("tiny-t2v", 4.0)
        told.published(0.01)
        told.publish_failed()
        told.acked(0.001)
        told.reconnected("consumer")
    assert _lines(metrics) >= {
        'reeld_jobs_total{code="out_of_memory",outcome="failed"} 1.0',
        'reeld_jobs_accepted_total{redelivered="true"} 1.0',
        'reeld_job_queue_wait_seconds_bucket{le="5.0"} 1.0',
        'reeld_job_queue_wait_seconds_bucket{le="2.5"} 0.0',
        "reeld_jobs_repeated_total 1.0",
        'reeld_job_retries_total{code="input_unavailable",level="ladder"} 1.0',
        "reeld_jobs_requeued_total 1.0",
        "reeld_job_seconds_sum 9.0",
        'reeld_job_phase_seconds_sum{phase="decode"} 0.2',
        "reeld_step_seconds_count 1.0",
        'reeld_model_load_seconds{model="tiny-t2v"} 4.0',
        "reeld_publish_seconds_count 1.0",
        "reeld_publish_failures_total 1.0",
        "reeld_ack_seconds_count 1.0",
        'reeld_broker_reconnects_total{connection="consumer"} 1.0',
        "reeld_measurements_dropped_total 0.0",
    }


def test_a_full_pipe_delays_nobody_and_is_owned_up_to(tmp_path: Path) -> None:
    """While the launcher reads nothing, measurements are dropped; once it reads again, it is told how many."""
    os.mkfifo(tmp_path / PIPE_FILE)
    reader = os.open(tmp_path / PIPE_FILE, os.O_RDWR | os.O_NONBLOCK)
    told = Measurements(tmp_path)
    for _ in range(10_000):
        told.step(1.0)
    first = os.read(reader, 1_000_000)
    told.step(2.0)
    dropped, last = os.read(reader, 1_000_000).splitlines()
    os.close(reader)
    kept = first.count(b"\n")
    assert first.endswith(b"\n"), "no line is torn"
    assert 0 < kept < 10_000
    assert dropped == f'["dropped", {10_000 - kept}, {{}}]'.encode()
    assert last == b'["step", 2.0, {}]'


def test_what_is_no_measurement_is_left_out(tmp_path: Path) -> None:
    """A line that is none, an unknown name or a wrong label changes nothing and ends nothing."""
    metrics = Metrics(CONFIG, Vitals(CONFIG, 1), tmp_path, world_size=1)
    before = {line for line in _lines(metrics) if not line.startswith("process_")}
    for line in (b"{", b"[]", b'["nothing", 1, {}]', b'["jobs", 1, {"colour": "red"}]', b'["step", "x", {}]'):
        metrics.feed(line)
    assert {line for line in _lines(metrics) if not line.startswith("process_")} == before


def test_without_a_pipe_nobody_is_told(tmp_path: Path) -> None:
    """No endpoint, or a bare torchrun: a measurement is nothing at all."""
    Measurements(tmp_path).step(1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("listen", ["127.0.0.1:9464", "[::1]:0", "localhost:1"])
def test_an_address_to_listen_on(listen: str) -> None:
    """host:port, an IPv6 address in brackets."""
    config = Config.model_validate({**CONFIG.model_dump(), "metrics": {"listen": listen}})
    assert config.metrics.address is not None
    host, port = config.metrics.address
    assert f"{f'[{host}]' if ':' in host else host}:{port}" == listen


@pytest.mark.parametrize("listen", ["9464", "127.0.0.1", ":9464", "on", "127.0.0.1:99999", "http://127.0.0.1:1", ""])
def test_what_is_no_address(listen: str) -> None:
    """Anything else is refused where it is written."""
    with pytest.raises(ValueError, match=r"metrics\.listen"):
        Config.model_validate({**CONFIG.model_dump(), "metrics": {"listen": listen}})
