"""Two daemons on one queue: they share the jobs, and whatever happens to one, each job has one result."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ops.private_broker import PrivateBroker
from tests.harness import Ear, Worker, fresh_vhost, idle, job, publish, take, write_config


@dataclass
class Pair:
    """Two workers of one rank each, on one queue, with one output directory."""

    workers: dict[str, Worker]
    ear: Ear
    url: str
    output: Path

    def wait_idle(self) -> None:
        after = self.ear.count
        for name, worker in self.workers.items():
            self.ear.wait(lambda seen, of=name: idle(seen) and seen.data["worker_id"] == of, after=after, worker=worker)  # type: ignore[misc]  # mypy wants lambdas without defaults


@pytest.fixture(scope="module")
def pair(broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    with fresh_vhost(broker) as url:
        ear = Ear(url)
        workers: dict[str, Worker] = {}
        try:
            for name in ("first", "second"):
                own = folder / name
                own.mkdir()
                config = write_config(own, models, nproc=1)
                text = config.read_text().replace('worker_id = "tester"', f'worker_id = "{name}"')
                config.write_text(text.replace(f"{own}/output", f"{folder}/output"))
                workers[name] = Worker(config, url, own)
            pair = Pair(workers, ear, url, folder / "output")
            pair.wait_idle()
            yield pair
        finally:
            for worker in workers.values():
                worker.end()
            ear.close()


def test_competing_daemons_share_the_jobs(pair: Pair) -> None:
    """Jobs of one queue are done by both daemons, each job once."""
    messages = [job(parameters={"seed": 1, "num_frames": 9, "num_inference_steps": 8}) for _ in range(6)]
    for message in messages:
        publish(pair.url, message)
    ends = [pair.ear.terminal(message["job_id"]) for message in messages]
    assert [end.name for end in ends] == ["succeeded"] * 6
    assert {end.data["worker_id"] for end in ends} == {"first", "second"}
    for message in messages:
        assert len(pair.ear.all(job_id=message["job_id"], name="started")) == 1


def test_row_19_one_job_at_two_daemons(pair: Pair) -> None:
    """The same job at two daemons at once, with other noise on each: one manifest wins, and both tell its result."""
    pair.wait_idle()
    parameters = {"height": 128, "width": 192, "num_frames": 17, "num_inference_steps": 12}
    message = job(parameters=parameters)  # without a seed each daemon draws its own
    publish(pair.url, message)
    publish(pair.url, message)
    key = f"job.{message['job_id']}.succeeded"
    first = pair.ear.wait(lambda seen: seen.routing_key == key)
    pair.ear.wait(lambda seen: seen.routing_key == key and seen.data["worker_id"] != first.data["worker_id"])
    started = pair.ear.all(job_id=message["job_id"], name="started")
    assert {seen.data["worker_id"] for seen in started} == {"first", "second"}, "both generated"
    ends = pair.ear.all(job_id=message["job_id"], name="succeeded")
    assert len({end.event["id"] for end in ends}) == 1
    assert len({str(end.data["result"]) for end in ends}) == 1
    files = list((pair.output / message["job_id"]).iterdir())
    assert sorted(path.suffix for path in files) == [".json", ".mp4"], files
    assert str(ends[0].data["result"]["video"]["path"]) in map(str, files)


def test_two_daemons_of_one_name_tell_of_each_other(pair: Pair, models: Path, tmp_path: Path) -> None:
    """The warning of each names the other's process, `reeld top` both, and nobody else is warned."""
    pair.wait_idle()
    config = write_config(tmp_path, models, nproc=1)
    config.write_text(config.read_text().replace('worker_id = "tester"', 'worker_id = "first"'))
    namesake = Worker(config, pair.url, tmp_path)
    try:
        told = [worker.wait_log("worker_id_shared") for worker in (namesake, pair.workers["first"])]
        assert [line["other_pid"] for line in told] == [line["pid"] for line in reversed(told)]
        top = [str(Path(sys.executable).parent / "reeld"), "top", "--once", "--json", "--url", pair.url]
        shown = json.loads(subprocess.run(top, check=True, capture_output=True, text=True, timeout=60).stdout)
        processes = {worker["worker_id"]: worker["processes"] for worker in shown["workers"]}
        assert {name.rpartition(" ")[2] for name in processes["first"]} == {str(line["pid"]) for line in told}
        assert len(processes["second"]) == 1
        assert namesake.drain() == 0
    finally:
        namesake.end()
    assert "worker_id_shared" not in pair.workers["second"].log_path.read_text()


def test_killed_daemon_hands_its_job_to_the_other(pair: Pair) -> None:
    """`kill -9` of a daemon in mid-job: the other one does the job. Ends the daemon; the last test but the drain."""
    pair.wait_idle()
    message = job(parameters={"seed": 1, "height": 128, "width": 192, "num_frames": 33, "num_inference_steps": 40})
    publish(pair.url, message)
    begun = pair.ear.wait(
        lambda seen: seen.routing_key == f"job.{message['job_id']}.progress" and seen.data["phase"] == "denoise"
    )
    victim = begun.data["worker_id"]
    pair.workers[victim].process.kill()
    other = next(name for name in pair.workers if name != victim)
    end = pair.ear.terminal(message["job_id"], worker=pair.workers[other])
    assert (end.name, end.data["worker_id"]) == ("succeeded", other)
    assert len(list((pair.output / message["job_id"]).glob("*.mp4"))) == 1
    assert pair.workers[other].drain() == 0
    assert take(pair.url, "reeld.jobs.test") == []
