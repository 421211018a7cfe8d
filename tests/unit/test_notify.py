"""What systemd is told: the protocol over a real socket, and the line of status for what the ranks do."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.notify import Notifier
from daemon.service_state import ServiceState, StatusText, is_ready


def _rank(rank: int = 0, *, consumer: str = "consuming", **fields: Any) -> dict[str, Any]:
    """A record as rank 0 leaves it for the launcher when it waits for jobs."""
    return {
        "rank": rank, "state": "idle", "phase": None, "work": "", "job_id": None, "step": None, "steps": None,
        "finishing": None, "service": {"consumer": {"status": consumer}}, **fields,
    }  # fmt: skip


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> "Iterator[tuple[socket.socket, str]]":
    """A socket that receives what is sent, and what NOTIFY_SOCKET says of it."""
    name = f"@reeld-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0"))
        receiver.settimeout(5)
        yield receiver, name


def test_assignments_arrive(manager: "tuple[socket.socket, str]") -> None:
    """Each call is one datagram of NAME=value lines; a value cannot add a line of its own."""
    receiver, name = manager
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": name})
    assert notifier.send(READY=1, STATUS="waiting\nSTOPPING=1")
    assert receiver.recv(4096).decode().splitlines() == ["READY=1", "STATUS=waiting STOPPING=1"]


def test_the_variables_are_taken() -> None:
    """No child can speak for the unit, and a watchdog that another process shall feed is none of ours."""
    environment = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(os.getpid()), "A": "b"}
    notifier = Notifier.from_environment(environment)
    assert environment == {"A": "b"}
    assert notifier.watchdog_seconds == 20
    assert notifier.send(READY=1) is False, "nobody listens, and nothing breaks"
    other = {"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(other).watchdog_seconds is None


def test_ready_is_said_once_every_rank_has_loaded_and_rank_0_consumes(manager: "tuple[socket.socket, str]") -> None:
    """More time is asked for until then, and never after."""
    receiver, name = manager
    state = ServiceState(Notifier.from_environment({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "100000"}), nproc=2)
    loading = {0: _rank(), 1: _rank(1, state="loading", work="wan", step=42, steps=100)}
    state.ranks(loading)
    state.ranks({0: _rank(consumer="connecting"), 1: _rank(1)})
    state.ranks({0: _rank(), 1: _rank(1)})
    state.ranks({0: _rank(), 1: _rank(1)})
    state.stopping(within_seconds=5)
    receiver.settimeout(0.2)
    seen = []
    while True:
        try:
            seen.append(receiver.recv(4096).decode())
        except TimeoutError:
            break
    assert [each for each in seen if "WATCHDOG" not in each] == [
        "EXTEND_TIMEOUT_USEC=120000000",
        "STATUS=loading wan 42 %",
        "READY=1",
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=5000000",
    ]
    assert "WATCHDOG=1" in seen


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ({}, "rank 0–1 starting"),  # noqa: RUF001
        ({0: _rank(), 1: _rank(1, state="joining")}, "rank 1 joining"),
        ({0: _rank(state="loading", work="wan", step=9, steps=10), 1: _rank(1, state="loading", work="w")}, "loading w"),  # noqa: E501
        ({0: _rank(), 1: _rank(1)}, "rank 0–1 ready; idle"),  # noqa: RUF001
        (
            {0: _rank(consumer="waiting for the broker: refused"), 1: _rank(1)},
            "rank 0–1 ready; waiting for the broker: refused",  # noqa: RUF001
        ),
        (
            {0: _rank(state="generating", phase="encode", job_id="a"), 1: _rank(1)},
            "rank 0–1 ready; job a encode",  # noqa: RUF001
        ),
        (
            {0: _rank(finishing={"job_id": "b"}), 1: _rank(1)},
            "rank 0–1 ready; job b finishing",  # noqa: RUF001
        ),
    ],
)  # fmt: skip
def test_the_line_of_status(records: dict[int, Any], text: str) -> None:
    """It says what the ranks do now, and what they wait for."""
    assert StatusText().of(records, 2) == text


def test_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on it says how long the job will take, by the steps so far, and counts down in between."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    text = StatusText()

    def at(step: int, job_id: str = "a") -> str:
        record = _rank(state="generating", phase="denoise", job_id=job_id, step=step, steps=50)
        return text.of({0: record}, 1).partition("step ")[2]

    assert at(10) == "10/50"
    clock[0] = 102
    assert at(12) == "12/50, 38 s left"
    clock[0] = 103
    assert at(12) == "12/50, 37 s left"
    assert at(0, job_id="b") == "0/50", "another job has a pace of its own"


def test_readiness() -> None:
    """A rank that has said nothing yet, or has left, is not ready; neither is a consumer that does not consume."""
    assert is_ready({0: _rank(), 1: _rank(1)}, 2)
    assert not is_ready({0: _rank()}, 2)
    assert not is_ready({0: _rank(), 1: _rank(1, state="left")}, 2)
    assert not is_ready({0: _rank(consumer="stopped")}, 1)
