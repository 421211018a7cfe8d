"""Logs on their way into a pipeline: what a real worker printed, through real loggers, no line unparsed or lost."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.harness import job
from tests.service.log_pipeline import LOGS, pipeline, run_pipeline
from tests.service.running import Service
from tests.service.tools import ROOT

# reeld's own logging saying what is hard to carry: 250 KB in a line, bytes that are no text, a line separator.
_ODD = r"""
from daemon.logs import finish_logs, setup_logs
setup_logs(format_="json", level="info", rank=3, local_rank=3, world_size=4, capture=True)
import os, structlog
log = structlog.get_logger("launcher")
with structlog.contextvars.bound_contextvars(job_id="odd-1", attempt=2):
    frames = [f"/srv/reeld/module.py:{line} function_{line} é" for line in range(90)]
    log.error("rank_stacks", of_rank=3, threads=[{"thread": str(n), "frames": frames} for n in range(60)])
    os.write(1, b"raw bytes \xff\xfe from C\n")
    try:
        raise ValueError("quote \" and \\ and \u2028")
    except ValueError:
        log.exception("crashed")
finish_logs()
"""


@pytest.fixture(scope="module")
def printed(service: Service) -> list[str]:
    """Every line that a worker of two ranks printed so far, a job's and a failed job's among them, and the odd ones."""
    service.wait_ready()
    assert service.do(job()) == "job_succeeded"
    assert service.do(job(parameters={"num_frames": -1})) == "job_malformed"
    odd = subprocess.run([sys.executable, "-c", _ODD], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [*service.worker.lines(), *odd.stderr.splitlines()]
    assert {json.loads(line)["rank"] for line in lines} == {None, 0, 1, 3}
    assert max(map(len, lines)) > 200_000
    return lines


def _who(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("timestamp", "event", "rank", "pid", "job_id", "level"))


def _file_of(record: dict[str, Any]) -> str:
    return "launcher.jsonl" if record["rank"] is None else f"rank-{record['rank']}.jsonl"


def test_journald_to_rsyslog(printed: list[str], tmp_path: Path) -> None:
    """Every line arrives parsed, in the file of its rank, with its job; not one is unparsed."""
    found = run_pipeline("rsyslog", tmp_path / "p", journal=printed, expected=len(printed))
    assert "unparsed.log" not in found
    sent = Counter((_file_of(record), _who(record)) for record in map(json.loads, printed))
    assert Counter((name, _who(json.loads(line))) for name, lines in found.items() for line in lines) == sent


def test_journald_to_syslog_ng(printed: list[str], tmp_path: Path) -> None:
    """The same with syslog-ng: the fields it parsed, and the line with its types."""
    found = run_pipeline("syslog-ng", tmp_path / "p", journal=printed, expected=len(printed))
    _check_syslog_ng(found, printed)


def test_files_to_syslog_ng(service: Service, printed: list[str], tmp_path: Path) -> None:
    """The files of `log.directory` say what the worker printed, and arrive as well."""
    assert printed
    files = sorted((service.folder / "logs").glob("*.jsonl"))
    assert [file.name for file in files] == ["launcher.jsonl", "rank-0.jsonl", "rank-1.jsonl"]
    lines = [line for file in files for line in file.read_text().splitlines()]
    found = run_pipeline("syslog-ng", tmp_path / "p", files=files, expected=len(lines))
    _check_syslog_ng(found, lines)


def _check_syslog_ng(found: dict[str, list[str]], sent: list[str]) -> None:
    assert "unparsed.log" not in found
    arrived = Counter[Any]()
    for name, lines in found.items():
        for line in lines:
            record = json.loads(line)
            whole = record["reeld"]
            for key in ("rank", "job_id", "level", "event"):
                assert record[key] == ("" if whole.get(key) is None else str(whole[key])), line[:300]
            arrived[name, _who(whole)] += 1
    assert arrived == Counter((_file_of(record), _who(record)) for record in map(json.loads, sent))


def test_without_our_setting_journald_cuts_long_lines(printed: list[str], tmp_path: Path) -> None:
    """Why journald-reeld.conf is there: without it the longest line comes in pieces, and they end as unparsed."""
    longest = max(printed, key=len)
    found = run_pipeline("rsyslog", tmp_path / "p", journal=[longest], expected=5, drop_in=False)
    assert found["unparsed.log"]


def test_logrotate_loses_no_line(tmp_path: Path) -> None:
    """Real logrotate, four times while a process writes its file: every line is in one of the files, once and whole."""
    directory = tmp_path / "ranks"
    config = tmp_path / "logrotate.conf"
    config.write_text((LOGS / "logrotate.conf").read_text().replace("/var/log/reeld", str(tmp_path)))
    config.chmod(0o644)
    script = """
import sys, threading, time
from pathlib import Path
from daemon.logs import setup_logs
setup_logs(format_="json", level="info", rank=0, local_rank=0, world_size=1, capture=False, directory=Path(sys.argv[1]))
import structlog
log = structlog.get_logger("writer")
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
number = 0
while not stop.is_set():
    log.info("line", number=number)
    number += 1
    time.sleep(0.0005)
print(number)
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    current = directory / "rank-0.jsonl"
    rotated = 0
    while rotated < 4:
        assert writer.poll() is None
        if current.exists() and current.stat().st_size:
            command = ["/usr/sbin/logrotate", "--force", "--state", str(tmp_path / "state"), str(config)]
            # Without systemctl: this machine's logger shall hear nothing of it.
            done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, timeout=30)
            # Twice within a second it refuses: the new name is taken.
            assert done.returncode == 0 or "already exists" in done.stderr, done.stderr
            rotated = len(list(directory.glob("rank-0.jsonl-*")))
    written, _ = writer.communicate(timeout=30)
    numbers = []
    for path in directory.iterdir():
        text = subprocess.run(["zcat", "--force", str(path)], check=True, capture_output=True, text=True).stdout
        numbers += [json.loads(line)["number"] for line in text.splitlines()]
    assert sorted(numbers) == list(range(int(written)))
    assert len(list(directory.glob("*.gz"))) >= 2


@pytest.mark.parametrize("logger", ["rsyslog", "syslog-ng"])
def test_logrotate_tells_the_logger(logger: str, tmp_path: Path) -> None:
    """What rsyslog or syslog-ng writes is rotated as well: it goes on in new files, and no line is lost."""

    def lines(number: int) -> list[str]:
        return [*(json.dumps({"rank": rank, "number": number}) for rank in (None, 0)), f"plain {number}"]

    names = {"launcher.jsonl", "rank-0.jsonl", "unparsed.log"}
    with pipeline(logger, tmp_path / "p", journal=lines(0)) as running:
        assert set(running.wait_lines(3)) == names
        running.logrotate(logger)
        found = running.found()
        assert {file.rsplit("-", 2)[0] for file in found if file not in names} == names
        assert not any(found.get(name) for name in names)  # a logger may have opened the new ones already, empty
        for number in range(1, 20):  # the first may still go to the old files: a signal is not waited for
            for line in lines(number):
                running.feed(line)
            found = running.wait_lines(3 * (number + 1))
            if all(found.get(name) for name in names):
                break
    assert all(found.get(name) for name in names)
    for name in names:
        old = next(file for file in found if file.startswith(f"{name}-"))
        numbers = re.findall(r'(?:"number": ?|plain )(\d+)', "\n".join(found[old] + found[name]))
        assert numbers == [str(each) for each in range(number + 1)]


def test_a_full_disk_or_a_missing_folder_costs_the_file_its_lines_and_nobody_else(tmp_path: Path) -> None:
    """What cannot be written to the file is said once in the log itself, and the file goes on once it can."""
    script = """
import shutil, sys
from pathlib import Path
from daemon.logs import finish_logs, setup_logs
directory = Path(sys.argv[1])
file = directory / "rank-0.jsonl"
directory.mkdir()
file.symlink_to("/dev/full")
setup_logs(format_="json", level="info", rank=0, local_rank=0, world_size=1, capture=True, directory=directory)
import structlog
log = structlog.get_logger("writer")
def say(what, count):
    for number in range(count):
        log.info("line", what=what, number=number)
say("full", 50)
file.unlink()
say("space", 2)
shutil.rmtree(directory)
say("gone", 50)
directory.mkdir()
say("back", 2)
finish_logs()
"""
    command = [sys.executable, "-c", script, str(tmp_path / "ranks")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert Counter(each["what"] for each in records if each["event"] == "line") == {
        "full": 50, "space": 2, "gone": 50, "back": 2,
    }  # fmt: skip
    said = [(each["event"], each.get("lines_lost")) for each in records if each["event"] != "line"]
    lost = [("log_file_failed", None), ("log_file_resumed", 50)]
    assert said == [*lost, *lost]
    text = (tmp_path / "ranks/rank-0.jsonl").read_text()
    assert [json.loads(line)["what"] for line in text.splitlines() if line] == ["back", "back"]


def test_a_job_costs_three_lines_however_long_it_is(service: Service, printed: list[str]) -> None:
    """At info no step is logged: a job of 40 steps says as much as one of 4, under 2 KB."""
    assert printed
    sizes = []
    for steps in (4, 40):
        message = job(parameters={"seed": 7, "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": steps})
        assert service.do(message) == "job_succeeded"
        lines = [line for line in service.worker.lines() if message["job_id"] in line]
        sizes.append([json.loads(line)["event"] for line in lines])
        assert sum(map(len, lines)) < 2000
    assert sizes[0] == sizes[1] == ["job_accepted", "job_started", "job_succeeded"]
