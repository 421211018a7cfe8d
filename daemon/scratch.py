"""Scratch folders: what is unfinished lives in one of its own for each process, and dies with it.

Owns the process's folder under a directory that several daemons may share, and sweeping those of processes that
are gone, killed ones too. Leaves out what is kept there (`daemon.storage`, `daemon.coordinator`).
"""

import fcntl
import os
import re
import shutil
import uuid
from pathlib import Path

import structlog

log = structlog.get_logger("storage")

_NAME = re.compile("[0-9a-f]{32}")
# No job's folder: a job_id begins with a letter or a digit.
_LOCK = ".reeld-lock"


class Scratch:
    """A folder under `directory` that is ours as long as this process lives.

    A lock in it says so to other daemons, on other machines too where the file system shares locks: the kernel drops
    it at any end of the process.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._folder: Path | None = None
        self._lock: int | None = None

    def folder(self) -> Path:
        """The folder. The first call makes it, and sweeps what dead processes left. Raises OSError."""
        if self._folder is None or not self._folder.is_dir():
            self._directory.mkdir(parents=True, exist_ok=True)
            _sweep(self._directory)
            folder = self._directory / uuid.uuid4().hex
            folder.mkdir()
            lock = os.open(folder / f"{_LOCK}.new", os.O_RDWR | os.O_CREAT, 0o600)  # ffmpeg does not inherit it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / f"{_LOCK}.new").rename(folder / _LOCK)  # nobody finds it before it is locked
            self._folder, self._lock = folder, lock
        return self._folder

    def close(self) -> None:
        """Removes the folder with all that is in it."""
        if self._folder is not None and self._lock is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._folder = self._lock = None


def _sweep(directory: Path) -> None:
    for folder in directory.iterdir():
        if not _NAME.fullmatch(folder.name):
            continue  # somebody else's: the directory may be /tmp
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            continue  # no scratch folder, or one that is being made
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its process lives
        else:
            shutil.rmtree(folder, ignore_errors=True)
            log.info("scratch_swept", folder=str(folder))
        finally:
            os.close(lock)
