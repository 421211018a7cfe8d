"""Ranks known by their files: with real processes, also when the disk is full, ended, or their number is another's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from daemon.rank_processes import announce_exit, exit_statuses, forget_ranks, kill_ranks, rank_processes

_RANK = """
import sys
from pathlib import Path
from daemon.rank_processes import announce
announce(Path(sys.argv[1]), 1, 2)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    forget_ranks(tmp_path, 2)
    with subprocess.Popen(
        [sys.executable, "-c", _RANK, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_rank_is_found_and_killed(rank: "subprocess.Popen[str]", tmp_path: Path) -> None:
    assert {number: process.pid for number, process in rank_processes(tmp_path).items()} == {1: rank.pid}
    assert psutil.Process(rank.pid).cmdline()[0] == "reeld: rank 1 of 2"
    assert kill_ranks(tmp_path) == [1]
    rank.wait(10)
    assert rank_processes(tmp_path) == {}


def test_a_rank_whose_torchrun_is_process_1_goes_on() -> None:
    """As in a container whose entrypoint is torchrun itself; needs root, for a namespace of its own."""
    rank = "from daemon.rank_processes import die_with_parent; die_with_parent(); print('goes on')"
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {rank!r}]).returncode)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REELD_")}
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", parent]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_a_rank_of_a_launcher_that_is_gone_ends_and_says_so() -> None:
    rank = "from daemon.rank_processes import die_with_parent; die_with_parent(); print('goes on')"
    environment = {**os.environ, "REELD_LAUNCHER": "1", "REELD_RUNTIME_DIRECTORY": "/nonexistent"}
    command = [sys.executable, "-c", rank]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not the one that started this rank" in done.stderr


def test_a_process_that_is_not_the_launchers_is_no_rank(tmp_path: Path) -> None:
    """A rank's file outlives it, and its number may be another process's by then."""
    (tmp_path / "rank-0.pid").write_text(str(os.getppid()))
    (tmp_path / "rank-1.pid").write_text("no number")
    assert rank_processes(tmp_path) == {}
    assert rank_processes(tmp_path, psutil.Process(os.getppid())) == {}, "nor is the launcher itself"


def test_exit_statuses_are_those_of_the_last_group(tmp_path: Path) -> None:
    forget_ranks(tmp_path, 2)
    assert exit_statuses(tmp_path, 2) == {}
    announce_exit(tmp_path, 0, 78)
    assert exit_statuses(tmp_path, 2) == {0: 78}
    forget_ranks(tmp_path, 2)
    assert exit_statuses(tmp_path, 2) == {}


def test_a_full_disk_hides_nothing(tmp_path: Path) -> None:
    """On a file system without a free block, in a mount namespace of its own."""
    script = f"""
import os, sys
from pathlib import Path
from daemon.rank_processes import announce_exit, exit_statuses, forget_ranks
runtime = Path({str(tmp_path)!r})
forget_ranks(runtime, 1)
try:
    with open(runtime / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
except OSError as error:
    assert error.errno == 28, error
forget_ranks(runtime, 1)
announce_exit(runtime, 0, 70)
assert exit_statuses(runtime, 1) == {{0: 70}}
"""
    mount = f'mount -t tmpfs -o size=64k tmpfs {tmp_path} && exec {sys.executable} -c "$1"'
    own = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    done = subprocess.run([*own, "sh", "-c", mount, "sh", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
