"""The process that ranks are forked from: what it leaves behind, its own faults, and doing without it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from daemon.rank_processes import fork_server_process
from ops.local_daemons import LocalDaemon, find_daemon
from tests.harness import Ear, Worker, idle, job, publish, write_config

# NVML, as far as torch asks it: it tells of one GPU, but only those who were forked from who loaded it.
_NVML = """
#include <unistd.h>
static pid_t loaded_by;
__attribute__((constructor)) static void load(void) { loaded_by = getpid(); }
int nvmlInit(void) { return getpid() == loaded_by; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
"""


@pytest.fixture
def ear(vhost: str) -> Iterator[Ear]:
    ear = Ear(vhost)
    yield ear
    ear.close()


def daemon_of(worker: Worker) -> LocalDaemon:
    found = find_daemon(worker.process.pid)
    assert found is not None
    return found


def fork_server_of(worker: Worker) -> psutil.Process:
    """Waits until it has said which process it is."""
    deadline = time.monotonic() + 60
    while True:
        daemon = daemon_of(worker)
        process = fork_server_process(daemon.runtime, daemon.launcher)
        if process is not None:
            return process
        assert time.monotonic() < deadline, worker.tail()
        time.sleep(0.05)  # its file offers no event to wait for


def succeeds(url: str, ear: Ear, worker: Worker) -> None:
    message = job()
    publish(url, message)
    assert ear.terminal(message["job_id"], worker=worker).name == "succeeded"


def test_ranks_share_what_it_has_imported_and_survive_its_faults(
    vhost: str, ear: Ear, models: Path, tmp_path: Path
) -> None:
    """Ranks are its children, named in `ps`, and own a fraction of what they use. A new one takes its place when it is
    killed, which ends its ranks as well, and when it hangs, so that nobody hears of a rank's end. Then a drain leaves
    nothing of it."""
    config = write_config(tmp_path, models, nproc=2, extra="[stall]\nsilence_seconds = 4")
    worker = Worker(config, vhost, tmp_path)
    try:
        ear.wait(idle, worker=worker)
        first, ranks = fork_server_of(worker), daemon_of(worker).ranks
        assert {process.ppid() for process in ranks.values()} == {first.pid}
        assert [ranks[rank].cmdline()[0] for rank in (0, 1)] == ["reeld: rank 0 of 2", "reeld: rank 1 of 2"]
        memory = ranks[1].memory_full_info()
        assert memory.uss < memory.rss / 2

        lines = len(worker.lines())
        first.kill()
        assert not psutil.wait_procs(list(ranks.values()), timeout=20)[1]
        worker.wait_log("consuming", after=lines)
        second, ranks = fork_server_of(worker), daemon_of(worker).ranks
        assert second.pid != first.pid
        succeeds(vhost, ear, worker)

        lines = len(worker.lines())
        second.suspend()
        ranks[1].kill()
        worker.wait_log("fork_server_killed")
        worker.wait_log("consuming", after=lines)
        third = fork_server_of(worker)
        assert third.pid != second.pid
        succeeds(vhost, ear, worker)

        assert worker.drain() == 0
        assert not psutil.wait_procs([third], timeout=20)[1]
    finally:
        worker.end()


def test_it_dies_with_a_launcher_that_is_killed_while_it_imports(vhost: str, models: Path, tmp_path: Path) -> None:
    worker = Worker(write_config(tmp_path, models, nproc=2), vhost, tmp_path)
    try:
        worker.wait_log("starting_ranks")
        server = fork_server_of(worker)
        assert not daemon_of(worker).ranks
        os.kill(worker.process.pid, signal.SIGKILL)
        assert not psutil.wait_procs([server], timeout=20)[1]
    finally:
        worker.end()


def test_ranks_that_import_for_themselves(vhost: str, ear: Ear, models: Path, tmp_path: Path) -> None:
    """`rank_start_method = "spawn"`: the same daemon, without a fork server."""
    config = write_config(tmp_path, models, nproc=1, extra='rank_start_method = "spawn"')
    worker = Worker(config, vhost, tmp_path)
    try:
        ear.wait(idle, worker=worker)
        assert daemon_of(worker).ranks[0].ppid() == worker.process.pid
        succeeds(vhost, ear, worker)
        assert worker.drain() == 0
    finally:
        worker.end()


def test_a_box_without_a_gpu_is_no_fault_of_the_fork_server(vhost: str, models: Path, tmp_path: Path) -> None:
    """Its imports ask CUDA here as well, but there is nothing that a second start could find."""
    config = write_config(tmp_path, models, nproc=1)
    config.write_text(config.read_text().replace('device = "cpu"', 'device = "cuda"'))
    worker = Worker(config, vhost, tmp_path)
    try:
        assert worker.process.wait(120) == 78
        events = [line["event"] for line in worker.logs()]
        assert "cuda_forked" not in events
        assert events.count("starting_ranks") == 1
        assert any("no GPU for local rank 0: 0 found" in line.get("reason", "") for line in worker.logs())
    finally:
        worker.end()


def test_a_fork_server_that_has_used_cuda_is_done_without(vhost: str, models: Path, tmp_path: Path) -> None:
    """Where torch could not count the GPUs by NVML its imports asked CUDA, and forked ranks may not use the GPU that is
    there. They say so, and the next ones import for themselves: those then find that this machine has no GPU."""
    config = write_config(tmp_path, models, nproc=1)
    config.write_text(config.read_text().replace('device = "cpu"', 'device = "cuda"'))
    (tmp_path / "nvml.c").write_text(_NVML)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    reeld = Path(sys.executable).parent / "reeld"
    command = ["env", f"LD_LIBRARY_PATH={tmp_path}", str(reeld), "run", "--config", str(config)]
    worker = Worker(config, vhost, tmp_path, command=command)
    try:
        assert worker.process.wait(120) == 78
        events = [line["event"] for line in worker.logs()]
        assert events.count("cuda_forked") == events.count("ranks_start_alone") == 1
        assert events.count("starting_ranks") == 2
        assert any("no GPU for local rank 0" in line.get("reason", "") for line in worker.logs())
    finally:
        worker.end()
