"""Daemons found among the processes of a box, and stacks asked of them: with stand-ins that hang as ranks do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ops.failure import CommandFailedError
from ops.local_daemons import LocalDaemon, find_daemons
from ops.stacks import choose, collect, text

# A launcher that starts one rank; both write their stacks when asked, as `daemon.logs` sets it up, and then hang in C.
_LAUNCHER = """
import ctypes, faulthandler, os, signal, subprocess, sys
runtime = os.environ["RUNTIME"]
os.makedirs(runtime)
faulthandler.register(signal.SIGRTMIN + 1, open(runtime + "/launcher-stacks.txt", "w"))
rank = '''
import ctypes, faulthandler, os, signal
from pathlib import Path
from daemon.rank_processes import announce
announce(Path(os.environ["REELD_RUNTIME_DIRECTORY"]), 0, 1)
faulthandler.register(signal.SIGRTMIN + 1, open(os.environ["REELD_RUNTIME_DIRECTORY"] + "/stacks-0.txt", "w"))
def hang_with_the_gil():
    print("ready", flush=True)
    while True:
        ctypes.PyDLL(None).sleep(1000)
hang_with_the_gil()
'''
open(runtime + "/config-path", "w").write("/x/fox.toml")
def wait_for_the_rank():
    subprocess.run([sys.executable, "-c", rank], env={**os.environ, "REELD_RUNTIME_DIRECTORY": runtime})
    while True:
        signal.pause()
wait_for_the_rank()
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """The stand-ins; as root with a /tmp of their own, which is how systemd's PrivateTmp= looks from outside."""
    command = [sys.executable, "-c", _LAUNCHER, "/opt/bin/reeld", "run"]
    runtime = str(tmp_path / "reeld-runtime")
    if os.geteuid() == 0:
        script = 'mount -t tmpfs none "$1" && shift && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), *command]
    with subprocess.Popen(
        command, env={**os.environ, "RUNTIME": runtime}, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def of(process: "subprocess.Popen[str]") -> LocalDaemon:
    (found,) = (daemon for daemon in find_daemons()[0] if daemon.launcher.pid == process.pid)
    return found


def test_every_process_answers_and_an_old_answer_is_not_repeated(launcher: "subprocess.Popen[str]") -> None:
    """The launcher and a rank that holds the GIL in C, twice; the second answer is the second only."""
    for _ in range(2):
        found = collect(of(launcher))
        frames = {
            process["name"]: [frame for thread in process["threads"] for frame in thread["frames"]]
            for process in found["processes"]
        }
        assert sum("wait_for_the_rank" in frame for frame in frames["launcher"]) == 1
        assert sum("hang_with_the_gil" in frame for frame in frames["rank 0"]) == 1
    assert launcher.poll() is None


def test_a_daemon_is_known_by_pid_and_by_its_configuration(launcher: "subprocess.Popen[str]") -> None:
    rank = of(launcher).ranks[0].pid
    for name in (str(launcher.pid), str(rank), "fox", "/x/fox.toml"):
        assert [daemon.launcher.pid for daemon in choose(name)] == [launcher.pid]
    with pytest.raises(CommandFailedError, match=f"there are: .*{launcher.pid}"):
        choose("nobody")


def test_a_stopped_rank_is_named_and_left_as_it_is(launcher: "subprocess.Popen[str]") -> None:
    """It cannot answer; the others do, and it stays stopped."""
    daemon = of(launcher)
    rank = daemon.ranks[0]
    rank.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while rank.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = collect(daemon)
    threads = {process["name"]: bool(process["threads"]) for process in found["processes"]}
    assert threads == {"launcher": True, "rank 0": False}
    assert any("no answer: it is stopped" in line for line in text(found))
    assert rank.status() == psutil.STATUS_STOPPED


def test_a_launcher_between_two_groups_is_found_as_well(launcher: "subprocess.Popen[str]") -> None:
    """Without ranks it is known by the file that it holds open."""
    rank = of(launcher).ranks[0]
    rank.kill()
    deadline = time.monotonic() + 10
    while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = collect(of(launcher))
    (process,) = found["processes"]
    assert process["name"] == "launcher"
    assert any("wait_for_the_rank" in frame for thread in process["threads"] for frame in thread["frames"])
