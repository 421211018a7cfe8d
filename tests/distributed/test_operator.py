"""The operator's tools beside one running worker of 2 ranks: top, stacks and drain, as a user calls them."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pika
import pytest

from daemon.events import worker_event
from ops.private_broker import PrivateBroker
from tests.harness import Ear, Faults, Worker, fresh_vhost, idle, job, publish, take, write_config

LONG = {"seed": 1, "height": 128, "width": 192, "num_frames": 33, "num_inference_steps": 40}


class Running:
    """A worker with its broker, and the `reeld` command beside it."""

    def __init__(self, worker: Worker, ear: Ear, faults: Faults, url: str, folder: Path) -> None:
        self.worker, self.ear, self.faults, self.url, self.folder = worker, ear, faults, url, folder

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ops.cli", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("REELD_")}
        return {**clean, "REELD_AMQP_URL": self.url, "COLUMNS": "120"}

    def reeld(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == status, done.stderr
        return done

    def heartbeat_of_a_ghost(self) -> None:
        """A worker that is heard once and never again."""
        data = {"worker_id": "ghost", "pool": "test", "state": "idle", "heartbeat_seconds": 0.5, "ranks": []}
        event = worker_event("heartbeat", worker_id="ghost", data=data)
        with closing(pika.BlockingConnection(pika.URLParameters(self.url))) as connection:
            connection.channel().basic_publish("reeld.status", event.routing_key, event.body)


@pytest.fixture(scope="module")
def running(broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("operator")
    # Under full load a rank may not be heard for more than three short heartbeats. And a name of its own: `stacks` asks
    # every daemon of the box by it.
    config = write_config(folder, models, nproc=2).rename(folder / "operator.toml")
    config.write_text(config.read_text().replace("heartbeat_seconds = 0.5", "heartbeat_seconds = 1"))
    faults = Faults(folder)
    with fresh_vhost(broker) as url:
        ear = Ear(url)
        worker = Worker(config, url, folder, faults=faults)
        try:
            ear.wait(idle, worker=worker)
            yield Running(worker, ear, faults, url, folder)
        finally:
            worker.end()
            ear.close()


def test_top_once_shows_workers_ranks_and_queues(running: Running) -> None:
    """One frame as JSON, as text and as a picture."""
    seen = json.loads(running.reeld("top", "--once", "--json").stdout)
    (worker,) = seen["workers"]
    assert (worker["worker_id"], worker["silent"], worker["heartbeat_seconds"]) == ("tester", False, 1)
    assert [rank["state"] for rank in worker["ranks"]] == ["idle", "idle"]
    assert seen["queues"] == {"test": {"waiting": 0, "dead": 0}}

    picture = running.folder / "top.svg"
    text = running.reeld("top", "--once", "--svg", str(picture)).stdout
    assert "tester" in text
    assert "idle" in text
    assert picture.read_text().startswith("<svg")


def test_top_is_live_and_leaves_the_terminal_as_it_was(running: Running) -> None:
    """A job's progress moves on the screen, and a worker that was heard once is silent; q ends it with 0, and the
    terminal echoes again."""
    parent, child = pty.openpty()
    before = termios.tcgetattr(child)
    process = subprocess.Popen(
        running.command("top"), env={**running.environment, "TERM": "xterm"}, stdin=child, stdout=child, stderr=child
    )
    message = job(parameters=LONG)
    seen = b""

    def read_until(*words: bytes) -> None:
        nonlocal seen
        while not all(word in seen for word in words):
            assert select.select([parent], [], [], 60)[0], seen[-2000:]
            seen += os.read(parent, 65536)

    try:
        read_until(b"tester", b"idle")
        publish(running.url, message)
        read_until(message["job_id"][:8].encode(), b"denoise", b"/40")
        running.heartbeat_of_a_ghost()
        read_until(b"ghost", b"silent for")
        os.write(parent, b"q")
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([parent], [], [], 0.2)[0]:
                os.read(parent, 65536)  # or it would wait for room to write
        assert process.poll() == 0
        assert termios.tcgetattr(child) == before
    finally:
        process.kill()
        process.wait()
        os.close(parent)
        os.close(child)
    assert running.ear.terminal(message["job_id"], worker=running.worker).name == "succeeded"


def test_top_without_a_terminal_prints_lines(running: Running) -> None:
    with subprocess.Popen(
        running.command("top"), env=running.environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("worker tester"))
        process.terminate()
    assert process.returncode == 0
    assert "pool=test" in line
    assert "0:idle 1:idle" in line


def test_stacks_of_a_rank_that_hangs_in_c_with_the_gil_held(running: Running) -> None:
    """Every rank and the launcher answer, by the name of the configuration, and the work goes on: the hang itself ends
    with the signal, and the job succeeds."""
    # Long enough to be there yet when rank 1, which the signal wakes, says again what it does.
    message = job(parameters={**job()["parameters"], "num_inference_steps": 40})
    running.faults.tell(message, "sleep_in_c", rank=1, step=1)
    publish(running.url, message)
    deadline = time.monotonic() + 60
    while not list(running.folder.glob("*-rank-1-*.fired")):
        assert time.monotonic() < deadline, running.worker.tail()
        time.sleep(0.1)  # the mark of a fault offers no event to wait for
    (daemon,) = json.loads(running.reeld("stacks", str(running.worker.process.pid), "--json").stdout)
    assert (daemon["pid"], daemon["config"]) == (running.worker.process.pid, str(running.folder / "operator.toml"))
    threads = {process["name"]: process["threads"] for process in daemon["processes"]}
    assert set(threads) == {"launcher", "rank 0", "rank 1"}
    frames = {name: [frame for thread in each for frame in thread["frames"]] for name, each in threads.items()}
    assert any("_act" in frame for frame in frames["rank 1"]), "where it hangs"
    assert any("rank.py" in frame for frame in frames["rank 0"])
    assert any("group_watch.py" in frame for frame in frames["launcher"])
    (record,) = (process for process in daemon["processes"] if process["name"] == "rank 1")
    assert record["job_id"] == message["job_id"]
    assert running.ear.terminal(message["job_id"], worker=running.worker).name == "succeeded"
    again = running.reeld("stacks", "operator").stdout  # the configuration's name; the first answer is not repeated
    assert "rank 1 (pid" in again
    assert "_act" not in again
    assert "there are: pid" in running.reeld("stacks", "nobody", status=1).stderr


def test_cancel_ends_a_running_job(running: Running) -> None:
    """The worker answers that it runs, and `--wait` ends with 0 once the job is cancelled. Asked again, it knows no
    such job; of one that was done before it says so."""
    message = job(parameters={**LONG, "num_inference_steps": 200})
    job_id = message["job_id"]
    publish(running.url, message)
    running.ear.wait(
        lambda seen: seen.routing_key == f"job.{job_id}.progress" and seen.data["phase"] == "denoise",
        worker=running.worker,
    )
    first, last = running.reeld("cancel", job_id, "--wait", "--timeout", "60").stdout.splitlines()
    assert first.startswith("tester: running")
    assert last == f"job {job_id} was cancelled"
    assert running.ear.terminal(job_id, worker=running.worker).name == "cancelled"
    assert running.reeld("cancel", job_id).stdout.startswith("tester: unknown")
    done = job()
    publish(running.url, done)
    assert running.ear.terminal(done["job_id"], worker=running.worker).name == "succeeded"
    assert running.reeld("cancel", done["job_id"]).stdout.startswith("tester: succeeded")


def test_drain_says_who_does_not_listen(running: Running) -> None:
    done = running.reeld("drain", "nobody", status=1)
    assert "nobody: no such worker listens" in done.stderr


def test_drain_finishes_the_job_and_stops_the_worker(running: Running) -> None:
    """The worker answers with its job, finishes it, says that it stopped, and ends with 0. Asked twice, it does not
    hand the job back. The last test: the worker is gone afterwards."""
    message = job(parameters={**LONG, "num_inference_steps": 100})
    publish(running.url, message)
    running.ear.wait(
        lambda seen: seen.routing_key == f"job.{message['job_id']}.progress" and seen.data["phase"] == "denoise",
        worker=running.worker,
    )
    first = running.reeld("drain", "tester").stdout
    assert first == f"tester: draining, finishes job {message['job_id']}\n"
    heartbeat = running.ear.wait(lambda seen: seen.data.get("draining") == "control")
    assert heartbeat.data["draining"] == "control"
    second = running.reeld("drain", "--all", "--wait").stdout.splitlines()
    assert second[0] == first.strip()
    assert second[-1] == "tester: stopped"
    assert running.worker.process.wait(60) == 0
    ends = [seen.name for seen in running.ear.all(job_id=message["job_id"]) if seen.name in ("succeeded", "failed")]
    assert ends == ["succeeded"]
    assert not [line for line in running.worker.logs() if line["event"] == "job_handed_back"]


def test_a_worker_that_fails_while_it_drains_by_message_stays_stopped(vhost: str, models: Path, tmp_path: Path) -> None:
    """Its rank is killed in mid-job: the daemon ends with 0, starts no other group, and the job goes back."""
    ear = Ear(vhost)
    worker = Worker(write_config(tmp_path, models, nproc=1), vhost, tmp_path)
    running = Running(worker, ear, Faults(tmp_path), vhost, tmp_path)
    message = job(parameters={**LONG, "num_inference_steps": 200})
    try:
        ear.wait(idle, worker=worker)
        publish(vhost, message)
        ear.wait(lambda seen: seen.name == "progress" and seen.data["phase"] == "denoise", worker=worker)
        running.reeld("drain", "tester")
        (rank,) = {line["pid"] for line in worker.logs() if line["rank"] == 0}
        os.kill(rank, signal.SIGKILL)
        assert worker.process.wait(60) == 0, worker.tail()
        assert len([line for line in worker.logs() if line["event"] == "starting_ranks"]) == 1
        assert [json.loads(body)["job_id"] for _, body in take(vhost, "reeld.jobs.test")] == [message["job_id"]]
    finally:
        worker.end()
        ear.close()
