"""Rows 14 to 18: a rank dies, hangs, runs out of memory or raises at a chosen step, on 1 and on 2 ranks.

The ranks are told what to meet by `tests/faults/sitecustomize.py`; the product has no hook for it. One worker serves
all tests of a number of ranks: what each test leaves behind is a worker that does the next job.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from ops.private_broker import PrivateBroker
from tests.harness import Ear, Faults, Seen, Worker, fresh_vhost, idle, job, publish, take, write_config

pytestmark = pytest.mark.broker  # asked for by the fixture that a test's number of ranks picks

STALL = """
[stall]
floor_seconds = 12
denoise_seconds = 12
silence_seconds = 10
"""


class Running:
    """A worker with everything around it."""

    def __init__(self, ranks: int, worker: Worker, ear: Ear, url: str, faults: Faults, folder: Path) -> None:
        self.ranks, self.worker, self.ear, self.url, self.faults, self.folder = ranks, worker, ear, url, faults, folder

    def end_of(self, message: dict[str, Any], timeout: float = 240) -> Seen:
        return self.ear.terminal(message["job_id"], worker=self.worker, timeout=timeout)

    def do(self, message: dict[str, Any]) -> Seen:
        publish(self.url, message)
        return self.end_of(message)

    def pids(self) -> dict[int, int]:
        """The processes that the ranks are now."""
        return {line["rank"]: line["pid"] for line in self.worker.logs() if line["rank"] is not None}

    def ended_once(self, message: dict[str, Any], name: str) -> None:
        """Whether the job has exactly one terminal event, of this name, and a manifest only if it succeeded."""
        names = [seen.name for seen in self.ear.all(job_id=message["job_id"])]
        assert [each for each in names if each in ("succeeded", "failed", "cancelled")] == [name]
        files = sorted(path.suffix for path in (self.folder / "output" / message["job_id"]).glob("*"))
        assert files == ([".json", ".mp4"] if name == "succeeded" else [])


@contextlib.contextmanager
def _running(ranks: int, broker: PrivateBroker, models: Path, folder: Path) -> Iterator[Running]:
    config = write_config(folder, models, nproc=ranks, topology="retry_delays_seconds = [1, 2]")
    text = config.read_text().replace("outcome_grace_seconds = 10", "outcome_grace_seconds = 5")
    config.write_text(text + STALL)
    faults = Faults(folder)
    with fresh_vhost(broker) as url:
        ear = Ear(url)
        worker = Worker(config, url, folder, faults=faults)
        try:
            ear.wait(idle, worker=worker)
            yield Running(ranks, worker, ear, url, faults, folder)
        finally:
            worker.end()
            ear.close()


@pytest.fixture(scope="module")
def one_rank(broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with _running(1, broker, models, tmp_path_factory.mktemp("one")) as running:
        yield running


@pytest.fixture(scope="module")
def two_ranks(broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with _running(2, broker, models, tmp_path_factory.mktemp("two")) as running:
        yield running


@pytest.fixture
def running(ranks: int, request: pytest.FixtureRequest) -> Running:
    """The worker of that number of ranks, which earlier tests may have used."""
    worker: Running = request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[ranks])
    return worker


def _kill_in_mid_job(running: Running, *, rank: int) -> list[dict[str, Any]]:
    """Has a rank die in mid-job. The job comes back once and is done, by new ranks. Returns the log of it."""
    message = job()
    running.faults.tell(message, "die", rank=rank, step=2)
    before = running.pids()
    begun = len(running.worker.lines())
    assert running.do(message).name == "succeeded"
    running.ended_once(message, "succeeded")
    logs = running.worker.logs()[begun:]
    assert [line["redelivered"] for line in logs if line["event"] == "job_accepted"] == [False, True]
    assert not any(psutil.pid_exists(pid) for pid in before.values()), "no rank of the old group is left"
    return logs


@pytest.mark.parametrize("ranks", [1, 2])
def test_row_14_rank_0_killed(running: Running) -> None:
    """`kill -9` of rank 0 in mid-job: the group starts again, the job comes back with a higher count, and ends once."""
    _kill_in_mid_job(running, rank=0)
    assert running.worker.process.poll() is None, "the launcher lives on"


@pytest.mark.parametrize("ranks", [2])
def test_row_15_peer_killed(running: Running) -> None:
    """`kill -9` of a peer in mid-job: the others stop within the grace, the group starts again, the job is done."""
    logs = _kill_in_mid_job(running, rank=1)
    assert not [line for line in logs if line["event"] == "survivors_killed"], "rank 0 ended by itself, at once"


@pytest.mark.timeout(600)  # the group starts three times
@pytest.mark.parametrize("ranks", [2])
def test_row_16_job_that_always_kills(running: Running) -> None:
    """A job that kills a process each time is dead-lettered with `worker_lost` after the delivery limit, and a job
    that waits behind it is done before that."""
    deadly, other = job(), job()
    running.faults.tell(deadly, "die", rank=1, step=1, times=None)
    publish(running.url, deadly)
    publish(running.url, other)
    failed = running.end_of(deadly, timeout=400)
    assert (failed.name, failed.data["code"]) == ("failed", "worker_lost")
    running.ended_once(deadly, "failed")
    ends = [seen.routing_key for seen in running.ear.all() if seen.name in ("succeeded", "failed")]
    assert ends.index(f"job.{other['job_id']}.succeeded") < ends.index(failed.routing_key), "others go on in between"
    assert len(running.ear.all(job_id=deadly["job_id"], name="started")) == 3, "as often as the delivery limit"
    letters = take(running.url, "reeld.jobs.test.dead")
    assert [properties.headers["x-reeld-code"] for properties, _ in letters] == ["worker_lost"]
    assert "3 workers were lost" in letters[0][0].headers["x-reeld-message"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("where", ["DiTBlock", "Encoder3d", "Decoder3d"])
def test_row_17_out_of_memory_on_all(running: Running, where: str) -> None:
    """Out of memory on every rank, in a step or while they encode or decode: failed for good at this shape, the
    processes live on, the next job is clean."""
    image = running.folder / "image.png"
    Image.new("RGB", (96, 64), "teal").save(image)
    of_image = {"task": "image_to_video", "inputs": {"input_image": image.as_uri()}}
    message = job(**(of_image if where == "Encoder3d" else {}))
    running.faults.tell(message, "oom", rank=None, module=where, step=1)
    before = running.pids()
    failed = running.do(message)
    assert (failed.name, failed.data["code"], failed.data["retryable"]) == ("failed", "out_of_memory", False)
    running.ended_once(message, "failed")
    assert len(running.ear.all(job_id=message["job_id"], name="started")) == 1
    assert running.do(job(**of_image)).name == "succeeded"
    assert running.pids() == before
    codes = [properties.headers["x-reeld-code"] for properties, _ in take(running.url, "reeld.jobs.test.dead")]
    assert codes == ["out_of_memory"]


@pytest.mark.parametrize("ranks", [2])
def test_row_17_out_of_memory_on_all_but_not_at_one_place(running: Running) -> None:
    """Out of memory on every rank, on one of them after it began a transfer that the other never did: failed for good
    as well, once; then the group starts again, and the next job meets nothing of it."""
    message = job()
    running.faults.tell(message, "oom", rank=0, module="Decoder3d")
    running.faults.tell(message, "oom", rank=1, module="isend_irecv")
    before = running.pids()
    failed = running.do(message)
    assert (failed.name, failed.data["code"], failed.data["retryable"]) == ("failed", "out_of_memory", False)
    following = job()
    assert running.do(following).name == "succeeded"
    assert len(running.ear.all(job_id=following["job_id"], name="started")) == 1
    running.ended_once(message, "failed")
    assert len(running.ear.all(job_id=message["job_id"], name="started")) == 1, "not tried again"
    assert not set(before.values()) & set(running.pids().values()), "no rank of the old group goes on"
    codes = [properties.headers["x-reeld-code"] for properties, _ in take(running.url, "reeld.jobs.test.dead")]
    assert codes == ["out_of_memory"]


@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1)])
def test_row_17_out_of_memory_on_one(running: Running, rank: int) -> None:
    """Out of memory on one rank, while the others hang in a collective: the outcome is the same, failed for good
    with that rank named; then the group starts again, and the next job is clean."""
    message = job()
    running.faults.tell(message, "oom", rank=rank, step=1)
    failed = running.do(message)
    assert (failed.name, failed.data["code"], failed.data["retryable"]) == ("failed", "out_of_memory", False)
    assert failed.data["message"].startswith(f"rank {rank}:")
    assert running.do(job()).name == "succeeded"
    running.ended_once(message, "failed")
    assert len(running.ear.all(job_id=message["job_id"], name="started")) == 1, "not tried again"
    codes = [properties.headers["x-reeld-code"] for properties, _ in take(running.url, "reeld.jobs.test.dead")]
    assert codes == ["out_of_memory"]


@pytest.mark.parametrize("ranks", [2])
def test_rank_that_raises_alone(running: Running) -> None:
    """A rank that raises alone ends the group within the grace; the job goes to the retry ladder with the error of
    that rank, and is done by the next attempt."""
    message = job()
    running.faults.tell(message, "raise", rank=1, step=1)
    done = running.do(message)
    assert (done.name, done.data["attempt"]) == ("succeeded", 2)
    running.ended_once(message, "succeeded")
    retrying = running.ear.all(job_id=message["job_id"], name="retrying")
    assert [(seen.data["code"], "told by a test" in seen.data["message"]) for seen in retrying] == [("internal", True)]


@pytest.mark.parametrize(
    ("ranks", "rank", "action"),
    [(1, 0, "hang"), (2, 0, "hang_in_c"), (2, 1, "hang"), (2, 1, "stop")],
)
def test_row_18_hung_rank(running: Running, rank: int, action: str) -> None:
    """A rank that hangs (in Python, in C with the GIL held, or stopped) is noticed within its stall limit, the stacks
    of all ranks are logged, the group comes back, and the job is done by its redelivery."""
    # A stopped rank must run to write its stacks: a short job would be done before the group is ended.
    steps = {"num_inference_steps": 200} if action == "stop" else {}
    message = job(parameters={**job()["parameters"], **steps})
    running.faults.tell(message, action, rank=rank, step=2)
    begun = len(running.worker.lines())
    before = running.pids()
    assert running.do(message).name == "succeeded"
    running.ended_once(message, "succeeded")
    logs = running.worker.logs()[begun:]
    stalled = [line for line in logs if line["event"] == "stalled"]
    assert len(stalled) == 1, "noticed once"
    # A rank that holds the GIL says nothing at all, not even which job it has.
    assert stalled[0]["job_id"] == message["job_id"] or stalled[0]["phase"] is None
    assert stalled[0]["age_seconds"] > stalled[0]["limit_seconds"]
    stacks = {line["of_rank"]: line["threads"] for line in logs if line["event"] == "rank_stacks"}
    assert set(stacks) == set(range(running.ranks))
    for threads in stacks.values():
        assert any("generate_frames" in frame for thread in threads for frame in thread["frames"])
    if action != "stop":
        assert any("_act" in frame for thread in stacks[rank] for frame in thread["frames"]), "where it hangs"
    assert len([line for line in logs if line["event"] == "job_accepted" and line["redelivered"]]) == 1
    assert not any(psutil.pid_exists(pid) for pid in before.values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_row_25_sigterm_when_idle(running: Running) -> None:
    """SIGTERM to an idle daemon ends it at once with 0. The last test of its worker, all of whose lines parse."""
    running.ear.wait(idle, after=running.ear.count, worker=running.worker)
    assert running.worker.drain() == 0, running.worker.tail()
    logs = running.worker.logs()
    assert logs[-1]["event"] == "stopped"
    assert {line["rank"] for line in logs} == {None, *range(running.ranks)}
