"""The launcher's watch: a group in which one rank makes no progress is ended, with the stacks of all logged.

Owns noticing (a stalled phase, a process that says nothing, survivors of a rank that died) and the end by SIGKILL,
which a stopped process obeys as well. Leaves out the limits (`daemon.stall`), asking for stacks (`daemon.stacks`) and
starting again (`daemon.launcher`).
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from daemon.health import PULSE_BYTES, RecordAges, pulse_path
from daemon.logs import STACKS_FILE
from daemon.rank_processes import forget_ranks, kill_fork_server, kill_ranks, rank_processes
from daemon.stacks import ask_stacks
from daemon.stall import Stall, find_stall

log = structlog.get_logger("launcher")

_TICK_SECONDS = 0.5
_SEEN_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the watch knows now: each rank's last record, how long ago it came, who died, and the stall, if any."""

    records: dict[int, dict[str, Any]]
    silent: dict[int, float]
    dead: list[int]
    stall: Stall | None
    looked_seconds_ago: float


class GroupWatch:
    """Watches one group from its start to its end; a context manager around the run.

    `join_seconds` is how long a rank may take until its first record, `silence_seconds` until its next one,
    `grace_seconds` how long the others may outlive a rank that died. `on_progress` is called with all records at
    every look that finds no stall.
    """

    def __init__(
        self,
        runtime: Path,
        world_size: int,
        *,
        join_seconds: float,
        silence_seconds: float,
        grace_seconds: float,
        on_progress: Callable[[Mapping[int, dict[str, Any]]], None],
    ) -> None:
        self._runtime = runtime
        self._world_size = world_size
        self._join = join_seconds
        self._silence = silence_seconds
        self._grace = grace_seconds
        self._on_progress = on_progress
        self._ages = RecordAges()
        self._records: dict[int, dict[str, Any]] = {}
        self._silent: dict[int, float] = {}
        self._looked_at = time.monotonic()
        self._stall: Stall | None = None
        self._ended = False  # by this watch: then it no longer looks
        self._lock = threading.Lock()
        self._dead: list[int] = []
        self._first_death: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="group-watch", daemon=True)
        forget_ranks(runtime, world_size)
        for rank in range(world_size):
            pulse_path(runtime, rank).write_bytes(b" " * PULSE_BYTES)

    def __enter__(self) -> "GroupWatch":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read_all()

    @property
    def jobs_succeeded(self) -> int:
        """How many jobs the group has finished with a video."""
        return int(self._records.get(0, {}).get("jobs_succeeded", 0))

    @property
    def ended_by(self) -> str | None:
        """Why this watch ended the group, if it did: `stalled`, or `survivors_killed` after a rank's death."""
        if not self._ended:
            return None
        return "stalled" if self._stall is not None else "survivors_killed"

    def look(self) -> Look:
        """What is known now. For any thread."""
        with self._lock:
            since = time.monotonic() - self._looked_at
            return Look(
                records=dict(self._records),
                silent={rank: seconds + since for rank, seconds in self._silent.items()},
                dead=self._dead,
                stall=self._stall,
                looked_seconds_ago=0.0 if self._ended else since,
            )

    def _run(self) -> None:
        self._watch()
        # The group was ended, which torchrun's agent sees at once; unless the fork server, which has to tell it, hangs.
        if not self._stop.wait(_SEEN_SECONDS):
            log.error("fork_server_killed", reason="the end of the ranks was not seen", after_seconds=_SEEN_SECONDS)
            kill_fork_server(self._runtime)

    def _watch(self) -> None:
        """Until the group ends, or has been ended here."""
        while not self._stop.wait(_TICK_SECONDS):
            self._read_all()
            stall = self._find_stall()
            if stall is not None:
                with self._lock:
                    self._stall, self._ended = stall, True
                self._end_stalled(stall)
                return
            if self._outlived():
                self._ended = True
                log.error("survivors_killed", ranks=sorted(kill_ranks(self._runtime)), grace_seconds=self._grace)
                return
            self._on_progress(self._records)

    def _read_all(self) -> None:
        with self._lock:
            for rank in range(self._world_size):
                # A record that is just being written over does not parse; the one before it still counts.
                with contextlib.suppress(ValueError):
                    self._records[rank] = json.loads(pulse_path(self._runtime, rank).read_bytes())
                self._silent[rank] = self._ages.silent_seconds(rank, self._records.get(rank))
            self._looked_at = time.monotonic()

    def _find_stall(self) -> Stall | None:
        for rank in range(self._world_size):
            record = self._records.get(rank)
            silent = self._silent[rank]
            if record is not None and record["state"] == "left":
                continue
            stall = find_stall(
                record or {"rank": rank},
                silent_seconds=silent,
                silence_limit_seconds=self._join if record is None else self._silence,
            )
            if stall is not None:
                return stall
        return None

    def _outlived(self) -> bool:
        """Whether ranks outlive, past the grace, one that ended without having left."""
        alive = rank_processes(self._runtime)
        dead = [rank for rank, record in self._records.items() if rank not in alive and record["state"] != "left"]
        self._dead = dead
        if not dead or not alive:
            self._first_death = None
            return False
        self._first_death = self._first_death or time.monotonic()
        return time.monotonic() - self._first_death > self._grace

    def _end_stalled(self, stall: Stall) -> None:
        shown = {key: value for key, value in asdict(stall).items() if key != "rank"}
        log.error("stalled", stalled_rank=stall.rank, **shown)
        processes = rank_processes(self._runtime)
        asked = {rank: (each, self._runtime / STACKS_FILE.format(rank=rank)) for rank, each in processes.items()}
        # A stopped one must run to answer.
        for rank, threads in sorted(ask_stacks(asked, wake=True).items()):
            record = {key: value for key, value in self._records.get(rank, {}).items() if key != "rank"}
            log.error("rank_stacks", of_rank=rank, of_pid=processes[rank].pid, threads=threads, record=record)
        log.error("group_killed", ranks=sorted(kill_ranks(self._runtime)))
