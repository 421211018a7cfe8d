"""The memory of cancels beside a disk that answers late or never."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from daemon.cancellations import Cancellations


def test_a_hung_disk_holds_nobody_up(tmp_path: Path) -> None:
    """A cancel counts at once, and can be forgotten; that it outlives the process is told only once it is written.

    A named pipe takes nothing until somebody reads it, as a file server that is away takes nothing until it is back.
    """
    path = tmp_path / "cancelled.jsonl"
    cancelled = Cancellations(path, memory_seconds=60)
    os.mkfifo(path)
    kept = []

    def cancel() -> None:
        kept.append(cancelled.add("a"))
        kept.append(cancelled.add("b"))
        cancelled.forget("b")

    consumer = threading.Thread(target=cancel, daemon=True)
    consumer.start()
    consumer.join(10)
    assert not consumer.is_alive()
    assert ("a" in cancelled, "b" in cancelled) == (True, False)
    assert [each.done() for each in kept] == [False, False]
    lines: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as reader, path.open("w"):  # the second keeps it open between two writers
        while len(lines) < 3:
            lines.append(json.loads(reader.readline()))
    for each in kept:
        each.result(10)
    assert [(line["job_id"], line["until"] > 0) for line in lines] == [("a", True), ("b", False), ("b", False)]


def test_what_is_written_is_what_holds_by_then(tmp_path: Path) -> None:
    """However many threads cancel and forget at once, the file ends with what the memory ends with."""
    cancelled = Cancellations(tmp_path / "cancelled.jsonl", memory_seconds=60)

    def cancel(number: int) -> None:
        for round_ in range(50):
            cancelled.add(f"job-{round_ % 7}")
            if (round_ + number) % 3:
                cancelled.forget(f"job-{round_ % 7}")

    threads = [threading.Thread(target=cancel, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cancelled.add("last").result()
    again = Cancellations(tmp_path / "cancelled.jsonl", memory_seconds=60)
    ids = [f"job-{number}" for number in range(7)] + ["last"]
    assert [job_id in again for job_id in ids] == [job_id in cancelled for job_id in ids]
