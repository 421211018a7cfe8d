"""A step before the first job, on two real ranks."""

from pathlib import Path
from typing import Any

from ops.private_broker import PrivateBroker
from tests.harness import Ear, Faults, Worker, fresh_vhost, idle, job, publish, write_config


def _serve_one_job(
    broker: PrivateBroker, models: Path, folder: Path, faults: Faults | None = None
) -> list[dict[str, Any]]:
    """What a worker that warms up logs, from its start over a job to its drain. No event says anything of it."""
    config = write_config(folder, models, nproc=2, extra='[parallel]\nwarm_up = ["64x96x9"]\n')
    with fresh_vhost(broker) as url:
        ear = Ear(url)
        worker = Worker(config, url, folder, faults=faults)
        try:
            ear.wait(idle, worker=worker)
            message = job()
            publish(url, message)
            assert ear.terminal(message["job_id"], worker=worker).name == "succeeded"
            assert worker.drain() == 0
        finally:
            worker.end()
            ear.close()
    assert not ear.all(job_id="warm-up")
    return worker.logs()


def test_every_model_is_warmed_up_before_a_job_is_taken(broker: PrivateBroker, models: Path, tmp_path: Path) -> None:
    """Each model runs one step at the shapes of `parallel.warm_up` before the queue is consumed."""
    logs = _serve_one_job(broker, models, tmp_path)
    events = [line["event"] for line in logs if line["rank"] == 0]
    warmed = {(line["model"], line["shape"]) for line in logs if line["event"] == "warmed_up"}
    assert {("tiny-t2v", "64x96x9"), ("tiny-i2v", "64x96x9")} <= warmed
    last = max(number for number, event in enumerate(events) if event == "warmed_up")
    assert last < events.index("consuming")


def test_a_group_that_broke_while_it_warmed_up_serves_without(
    broker: PrivateBroker, models: Path, tmp_path: Path
) -> None:
    """A peer that dies in every warm-up costs one group; the next one says so, does without, and does the job."""
    faults = Faults(tmp_path)
    faults.tell({"job_id": "warm-up"}, "die", rank=1, times=None)
    events = [line["event"] for line in _serve_one_job(broker, models, tmp_path, faults)]
    assert events.count("starting_ranks") == 2
    assert events.count("not_warmed_up") == 1
    assert "warmed_up" not in events
