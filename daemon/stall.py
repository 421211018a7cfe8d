"""Stalls: how long a rank may go without progress, and what its Python stacks say when it went longer.

Owns the limit of each phase, learned from what the phase usually takes, and the verdict over a rank's record. Leaves
out the record itself (`daemon.health`) and what is done about a stall (`daemon.group_watch`, `daemon.health`).
"""

import faulthandler
import re
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from daemon.sections import StallConfig

_WORKS_REMEMBERED = 256
# How long an input takes is the outside world's affair, and fetching it has deadlines of its own.
_NOT_LEARNED = ("stage",)
_THREAD = re.compile(r"^(Current thread|Thread) (0x[0-9a-f]+).*\(most recent call first\):$")
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<function>.*)$')


class StallLimits:
    """The stall limit of each phase of each kind of work, in seconds.

    A phase that was never seen at this work (a model at a shape) has the configuration's ceiling: its first step
    may compile kernels. Then the limit is a multiple of the longest time seen between two signs of progress, at
    least the floor and at most the ceiling.
    """

    def __init__(self, config: StallConfig) -> None:
        self._config = config
        self._longest: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def learn(self, phase: str, work: str, seconds: float) -> None:
        """A phase made progress after `seconds`."""
        if phase in _NOT_LEARNED:
            return
        with self._lock:
            key = (phase, work)
            self._longest[key] = max(seconds, self._longest.pop(key, 0.0))
            while len(self._longest) > _WORKS_REMEMBERED:
                self._longest.popitem(last=False)

    def limit(self, phase: str, work: str) -> float:
        """Seconds that the phase may last without progress."""
        ceiling = self._config.ceiling(phase)
        with self._lock:
            longest = self._longest.get((phase, work))
        if longest is None:
            return ceiling
        return min(ceiling, max(self._config.floor_seconds, self._config.multiple * longest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """A rank that makes no progress. `phase` is None for one whose process says nothing at all."""

    rank: int
    phase: str | None
    job_id: str | None
    step: int | None
    age_seconds: float
    limit_seconds: float


def find_stall(record: dict[str, Any], *, silent_seconds: float, silence_limit_seconds: float) -> Stall | None:
    """The stall that a rank's record shows, if any. `silent_seconds` is the record's own age, by the reader's clock."""
    if silent_seconds > silence_limit_seconds:
        return Stall(
            rank=record["rank"],
            phase=None,
            job_id=record.get("job_id"),
            step=record.get("step"),
            age_seconds=round(silent_seconds, 3),
            limit_seconds=silence_limit_seconds,
        )
    for track in (record, record.get("finishing")):
        if track is None or track.get("stall_limit_seconds") is None:
            continue
        age = track["last_progress_age_seconds"] + silent_seconds
        if age > track["stall_limit_seconds"]:
            return Stall(
                rank=record["rank"],
                phase=track["phase"],
                job_id=track["job_id"],
                step=track.get("step"),
                age_seconds=round(age, 3),
                limit_seconds=track["stall_limit_seconds"],
            )
    return None


def parse_stacks(trace: str) -> list[dict[str, Any]]:
    """faulthandler's text as one entry a thread: `{thread, current, frames}`, innermost frame first."""
    threads: list[dict[str, Any]] = []
    for line in trace.splitlines():
        if header := _THREAD.match(line):
            threads.append({"thread": header[2], "current": header[1] == "Current thread", "frames": []})
        elif (frame := _FRAME.match(line)) and threads:
            threads[-1]["frames"].append(f"{frame['file']}:{frame['line']} {frame['function']}")
    return threads


def own_stacks() -> list[dict[str, Any]]:
    """The stacks of this process's threads, as `parse_stacks` gives them."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return parse_stacks(file.read().decode(errors="replace"))
