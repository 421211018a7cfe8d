"""Rows 14 to 18: a rank dies, hangs, runs out of memory or raises at a chosen step, on 1 and on 2 ranks.

The ranks are told what to meet by `tests/faults/sitecustomize.py`; the product has no hook for it. One worker serves
all tests of a number of ranks: what each test leaves behind is a worker that does the next job.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ops.private_broker import PrivateBroker
from tests.harness import Ear, Faults, Seen, Worker, fresh_vhost, idle, job, publish, write_config

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


@pytest.fixture(scope="module", params=[1, 2])
def running(
    request: pytest.FixtureRequest, broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    ranks: int = request.param
    folder = tmp_path_factory.mktemp("faults")
    config = write_config(folder, models, nproc=ranks, topology="retry_delays_seconds = [1, 2]")
    config.write_text(config.read_text() + STALL)
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


@pytest.mark.parametrize(
    ("running", "rank", "action"),
    [(1, 0, "hang"), (2, 0, "hang_in_c"), (2, 1, "hang"), (2, 1, "stop")],
    indirect=["running"],
)
def test_row_18_hung_rank(running: Running, rank: int, action: str) -> None:
    """A rank that hangs (in Python, in C with the GIL held, or stopped) is noticed within its stall limit, the stacks
    of all ranks are logged, the group comes back, and the job is done by its redelivery."""
    message = job()
    running.faults.tell(message, action, rank=rank, step=2)
    begun = len(running.worker.lines())
    before = running.pids()
    assert running.do(message).name == "succeeded"
    running.ended_once(message, "succeeded")
    logs = running.worker.logs()[begun:]
    stalled = [line for line in logs if line["event"] == "stalled"]
    assert len(stalled) == 1, "noticed once"
    assert stalled[0]["job_id"] == message["job_id"]
    assert stalled[0]["age_seconds"] > stalled[0]["limit_seconds"]
    stacks = {line["of_rank"]: line["threads"] for line in logs if line["event"] == "rank_stacks"}
    assert set(stacks) == set(range(running.ranks))
    for threads in stacks.values():
        assert any("generate_frames" in frame for thread in threads for frame in thread["frames"])
    if action != "stop":
        assert any("_act" in frame for thread in stacks[rank] for frame in thread["frames"]), "where it hangs"
    assert len([line for line in logs if line["event"] == "job_accepted" and line["redelivered"]]) == 1
    assert not any(psutil.pid_exists(pid) for pid in before.values())
