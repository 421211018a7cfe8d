"""Noticing another process under the same worker_id."""

import json
from typing import Any

from structlog.testing import capture_logs

from daemon.events import worker_event
from daemon.presence import Presence


def sent(presence: Presence, **data: Any) -> bytes:
    return worker_event("heartbeat", worker_id="box", data={**presence.identity, **data}).body


def test_another_process_is_told_of_once_and_then_seldom() -> None:
    own, other, third = (Presence("box") for _ in range(3))
    with capture_logs() as logs:
        for sender in (own, other, own, other, third, other):
            own.hear(sent(sender, host="far", pid=41 if sender is other else 42))
    assert [(line["event"], line["other_host"], line["other_pid"]) for line in logs] == [
        ("worker_id_shared", "far", 41),
        ("worker_id_shared", "far", 42),
    ]


def test_the_process_before_this_one_is_no_other() -> None:
    """Killed with its rank's process, it may have left heartbeats that the broker still has."""
    late = sent(Presence("box"))
    own = Presence("box")
    event = json.loads(late)
    event["time"] = "2026-01-01T00:00:00.000Z"
    with capture_logs() as logs:
        own.hear(json.dumps(event).encode())
        assert logs == []
        own.hear(sent(Presence("box")))
    assert len(logs) == 1


def test_what_is_no_heartbeat_is_passed_over() -> None:
    old = worker_event("heartbeat", worker_id="box", data={"state": "idle"}).body  # as it was without these fields
    with capture_logs() as logs:
        for body in (b"", b"\xff", b"[]", b"{}", b'{"data": 1, "time": "x"}', b'{"data": {}}', b"[" * 100_000, old):
            Presence("box").hear(body)
    assert logs == []
