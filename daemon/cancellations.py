"""Which jobs were cancelled: a bounded, expiring memory that outlives the process.

A cancel reaches every daemon and may name a job that is still queued, so each remembers it until it meets the job.
Leaves out what a cancel does to a job that runs (`daemon.coordinator`).
"""

import json
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import structlog

log = structlog.get_logger("job")

_IDS_REMEMBERED = 10_000


class Cancellations:
    """The cancelled ids, in memory and in a file of JSON lines. For any thread.

    Only a thread of its own writes the file: no cancel, step or ack waits for a disk.
    """

    def __init__(self, path: Path, *, memory_seconds: float) -> None:
        self._path = path
        self._memory_seconds = memory_seconds
        self._until: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()  # of changes to the memory
        self._lines = 0  # of the file
        self._load()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cancellations")

    def add(self, job_id: str) -> Future[None]:
        """Remembers a cancelled job for `memory_seconds`; past ten thousand, the oldest is forgotten.

        What it returns is done once that is written, or the disk has refused it, which is logged.
        """
        forgotten = None
        with self._lock:
            self._until[job_id] = time.time() + self._memory_seconds
            self._until.move_to_end(job_id)
            if len(self._until) > _IDS_REMEMBERED:
                forgotten, _ = self._until.popitem(last=False)
        if forgotten is not None:
            log.warning("cancel_forgotten", job_id=forgotten, reason=f"more than {_IDS_REMEMBERED} cancelled jobs")
        return self._writer.submit(self._append, job_id)

    def forget(self, job_id: str) -> None:
        """The job ended in another way: a later job of this id is not meant."""
        with self._lock:
            known = self._until.pop(job_id, None) is not None
        if known:
            self._writer.submit(self._append, job_id)

    def __contains__(self, job_id: str) -> bool:
        # Takes no lock: the main thread asks at every step, and a signal's handler may interrupt it there.
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
        with self._lock:
            entries = list(self._until.items())
        self._lines = len(entries)
        try:
            new = self._path.with_name(self._path.name + ".new")
            new.write_text("".join(_line(job_id, until) for job_id, until in entries), encoding="utf-8")
            new.replace(self._path)
        except OSError as error:
            self._unwritable(error)

    def _append(self, job_id: str) -> None:
        """Writes down what holds for a job by now: the line of the last change, which comes last, is right."""
        if self._lines >= 2 * _IDS_REMEMBERED:  # most of them are of ids that were forgotten since
            self._rewrite()
            return
        self._lines += 1
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(job_id, self._until.get(job_id, 0.0)))
        except OSError as error:
            self._unwritable(error)

    def _unwritable(self, error: OSError) -> None:
        log.warning("cancels_not_kept", path=str(self._path), reason=str(error), consequence="a restart forgets them")


def _line(job_id: str, until: float) -> str:
    return json.dumps({"job_id": job_id, "until": until}) + "\n"
