"""Which jobs were cancelled: a bounded, expiring memory that outlives the process.

A cancel reaches every daemon and may name a job that is still queued, so each remembers it until it meets the job.
Leaves out what a cancel does to a job that runs (`daemon.coordinator`).
"""

import json
import threading
import time
from collections import OrderedDict
from pathlib import Path

import structlog

log = structlog.get_logger("job")

_IDS_REMEMBERED = 10_000


class Cancellations:
    """The cancelled ids, in memory and in a file of JSON lines. For any thread."""

    def __init__(self, path: Path, *, memory_seconds: float) -> None:
        self._path = path
        self._memory_seconds = memory_seconds
        self._until: OrderedDict[str, float] = OrderedDict()
        self._lines = 0  # of the file
        self._lock = threading.Lock()
        self._load()

    def add(self, job_id: str) -> None:
        """Remembers a cancelled job for `memory_seconds`; past ten thousand, the oldest is forgotten."""
        with self._lock:
            self._until.pop(job_id, None)
            self._until[job_id] = time.time() + self._memory_seconds
            self._append(job_id)
            if len(self._until) > _IDS_REMEMBERED:
                forgotten, _ = self._until.popitem(last=False)
                log.warning("cancel_forgotten", job_id=forgotten, reason=f"more than {_IDS_REMEMBERED} cancelled jobs")

    def forget(self, job_id: str) -> None:
        """The job ended in another way: a later job of this id is not meant."""
        with self._lock:
            if self._until.pop(job_id, None) is not None:
                self._append(job_id)

    def __contains__(self, job_id: str) -> bool:
        with self._lock:
            return self._until.get(job_id, 0.0) > time.time()

    def _load(self) -> None:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return  # none yet; a folder that cannot be read is found out by the launcher's checks
        now = time.time()
        for line in lines:
            try:
                entry = json.loads(line)
                job_id, until = str(entry["job_id"]), float(entry["until"])
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a process that was killed
            self._until.pop(job_id, None)
            if until > now:
                self._until[job_id] = until
        while len(self._until) > _IDS_REMEMBERED:
            self._until.popitem(last=False)
        self._rewrite()

    def _rewrite(self) -> None:
        self._lines = len(self._until)
        text = "".join(self._line(job_id) for job_id in self._until)
        try:
            new = self._path.with_name(self._path.name + ".new")
            new.write_text(text, encoding="utf-8")
            new.replace(self._path)
        except OSError as error:
            self._unwritable(error)

    def _append(self, job_id: str) -> None:
        if self._lines >= 2 * _IDS_REMEMBERED:  # most of them are of ids that were forgotten since
            self._rewrite()
            return
        self._lines += 1
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._line(job_id))
        except OSError as error:
            self._unwritable(error)

    def _line(self, job_id: str) -> str:
        return json.dumps({"job_id": job_id, "until": self._until.get(job_id, 0.0)}) + "\n"

    def _unwritable(self, error: OSError) -> None:
        log.warning("cancels_not_kept", path=str(self._path), reason=str(error), consequence="a restart forgets them")
