"""A step before the first job, on two real ranks."""

from pathlib import Path

from ops.private_broker import PrivateBroker
from tests.harness import Ear, Faults, Worker, fresh_vhost, idle, job, publish, write_config


def test_every_model_is_warmed_up_before_a_job_is_taken(broker: PrivateBroker, models: Path, tmp_path: Path) -> None:
    """Each model runs one step at the shapes of `parallel.warm_up` before the queue is consumed, told in the log and in
    no event."""
    extra = '[parallel]\nwarm_up = ["64x96x9"]\n'
    config = write_config(tmp_path, models, nproc=2, extra=extra)
    with fresh_vhost(broker) as url:
        ear = Ear(url)
        worker = Worker(config, url, tmp_path)
        try:
            ear.wait(idle, worker=worker)
            message = job()
            publish(url, message)
            assert ear.terminal(message["job_id"], worker=worker).name == "succeeded"
            assert worker.drain() == 0
        finally:
            worker.end()
            ear.close()
    logs = worker.logs()
    events = [line["event"] for line in logs if line["rank"] == 0]
    warmed = {(line["model"], line["shape"]) for line in logs if line["event"] == "warmed_up"}
    assert {("tiny-t2v", "64x96x9"), ("tiny-i2v", "64x96x9")} <= warmed
    assert events.index("warmed_up") < events.index("consuming")
    assert not ear.all(job_id="warm-up")


def test_a_group_that_broke_while_it_warmed_up_serves_without(
    broker: PrivateBroker, models: Path, tmp_path: Path
) -> None:
    """A peer that dies in every warm-up costs one group; the next one says so, does without, and does the job."""
    config = write_config(tmp_path, models, nproc=2, extra='[parallel]\nwarm_up = ["64x96x9"]\n')
    faults = Faults(tmp_path)
    faults.tell({"job_id": "warm-up"}, "die", rank=1, times=None)
    with fresh_vhost(broker) as url:
        ear = Ear(url)
        worker = Worker(config, url, tmp_path, faults=faults)
        try:
            ear.wait(idle, worker=worker)
            message = job()
            publish(url, message)
            assert ear.terminal(message["job_id"], worker=worker).name == "succeeded"
            assert worker.drain() == 0
        finally:
            worker.end()
            ear.close()
    events = [line["event"] for line in worker.logs()]
    assert events.count("starting_ranks") == 2
    assert events.count("not_warmed_up") == 1
    assert "warmed_up" not in events
