"""Rows 25 and 26: what a daemon does with the job in hand when it must stop.

Stopping when idle is in `test_rank_faults.py`, in mid-job in `test_path.py`, while starting in `test_failures.py`.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Ear, Faults, Worker, idle, job, publish, take, write_config

LONG = {"seed": 1, "height": 128, "width": 192, "num_frames": 33, "num_inference_steps": 200}


def _config(folder: Path, models: Path, *, ranks: int, limits: str) -> Path:
    config = write_config(folder, models, nproc=ranks)
    config.write_text(config.read_text().replace("outcome_grace_seconds = 10", limits))
    return config


def _publish_and_wait_for_steps(worker: Worker, ear: Ear, url: str, message: dict[str, Any]) -> None:
    ear.wait(idle, worker=worker)
    publish(url, message)
    ear.wait(
        lambda seen: seen.routing_key == f"job.{message['job_id']}.progress" and seen.data["phase"] == "denoise",
        worker=worker,
    )


def _is_back_in_the_queue(ear: Ear, url: str, message: dict[str, Any]) -> None:
    """The job is in the queue, at the cost of one delivery at most, and nobody was told of an end."""
    (back,) = [properties for properties, _ in take(url, "reeld.jobs.test")]
    assert (back.headers or {}).get("x-delivery-count", 0) <= 1, "none from 4.3 on, but where the connection was lost"
    assert not [seen for seen in ear.all(job_id=message["job_id"]) if seen.name in ("succeeded", "failed", "cancelled")]
    assert take(url, "reeld.jobs.test.dead") == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_row_25_second_sigterm_hands_back(vhost: str, models: Path, tmp_path: Path, ranks: int) -> None:
    """The first SIGTERM lets the job go on; the second one stops it at the next step of every rank, requeues it, and
    ends the daemon with 0."""
    ear = Ear(vhost)
    worker = Worker(_config(tmp_path, models, ranks=ranks, limits="outcome_grace_seconds = 30"), vhost, tmp_path)
    message = job(parameters=LONG)
    try:
        _publish_and_wait_for_steps(worker, ear, vhost, message)
        worker.process.send_signal(signal.SIGTERM)
        number = ear.count
        ear.wait(lambda seen: seen.name == "progress" and seen.data["step"] > 0, after=number, worker=worker)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(120) == 0, worker.tail()
        _is_back_in_the_queue(ear, vhost, message)
        events = [line["event"] for line in worker.logs()]
        assert events.count("job_handed_back") == 1
        assert events.count("left") == ranks, "in order, not killed"
    finally:
        worker.end()
        ear.close()


def test_row_25_a_waiting_job_loses_no_delivery(vhost: str, models: Path, tmp_path: Path) -> None:
    """A worker that drains finishes its job, and the one behind it, which has just become the next, is left alone."""
    ear = Ear(vhost)
    worker = Worker(_config(tmp_path, models, ranks=1, limits="outcome_grace_seconds = 30"), vhost, tmp_path)
    message = job(parameters={**LONG, "num_inference_steps": 20})
    try:
        _publish_and_wait_for_steps(worker, ear, vhost, message)
        publish(vhost, job(job_id="waits"))
        assert worker.drain(120) == 0, worker.tail()
        assert ear.terminal(message["job_id"]).name == "succeeded"
        ((properties, body),) = take(vhost, "reeld.jobs.test")
        assert json.loads(body)["job_id"] == "waits"
        assert (properties.headers or {}).get("x-delivery-count", 0) == 0
    finally:
        worker.end()
        ear.close()


def test_row_26_drain_limit(vhost: str, models: Path, tmp_path: Path) -> None:
    """A job that outlasts `limits.drain_seconds` is requeued, never acked, and the daemon ends with 0."""
    ear = Ear(vhost)
    limits = "outcome_grace_seconds = 30\ndrain_seconds = 1"
    worker = Worker(_config(tmp_path, models, ranks=1, limits=limits), vhost, tmp_path)
    message = job(parameters=LONG)
    try:
        _publish_and_wait_for_steps(worker, ear, vhost, message)
        assert worker.drain(120) == 0, worker.tail()
        _is_back_in_the_queue(ear, vhost, message)
        assert [line for line in worker.logs() if line["event"] == "job_handed_back"]
    finally:
        worker.end()
        ear.close()


def test_row_26_drain_limit_with_a_hung_rank(vhost: str, models: Path, tmp_path: Path) -> None:
    """A rank that hangs while the daemon drains cannot hold it: past the limit and the grace the ranks are killed, the
    job goes back to the queue, and the daemon ends with 0."""
    ear = Ear(vhost)
    faults = Faults(tmp_path)
    limits = "outcome_grace_seconds = 2\ndrain_seconds = 5"
    worker = Worker(_config(tmp_path, models, ranks=2, limits=limits), vhost, tmp_path, faults=faults)
    message = job(parameters=LONG)
    faults.tell(message, "hang", rank=1, step=1)
    try:
        _publish_and_wait_for_steps(worker, ear, vhost, message)
        assert worker.drain(120) == 0, worker.tail()
        _is_back_in_the_queue(ear, vhost, message)
        assert [line["ranks_killed"] for line in worker.logs() if line["event"] == "drain_overdue"] == [[0, 1]]
    finally:
        worker.end()
        ear.close()
