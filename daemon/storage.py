"""What a job leaves on disk: the video file and, after it, the manifest that says the job is done.

Owns the layout of the output directory, `<directory>/<job_id>/video-<hash>.mp4` and `manifest.json`, and the
order: file (in the process's scratch folder under `<directory>/.unfinished`, fsync, rename), then manifest (created
only if there is none). Leaves out encoding.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.errors import ErrorCode, TransientJobError
from daemon.scratch import Scratch

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"  # no job's folder: a job_id begins with a letter or a digit


@dataclass(frozen=True, slots=True)
class StoredVideo:
    path: Path
    sha256: str
    bytes: int


class Storage:
    """The output directory of one pool's jobs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._scratch = Scratch(directory / UNFINISHED)

    def open(self) -> None:
        """Sweeps what killed daemons left unfinished. Raises TransientJobError."""
        try:
            self._scratch.folder()
        except OSError as error:
            raise _unavailable(error) from error

    def close(self) -> None:
        """Removes what is unfinished."""
        self._scratch.close()

    def manifest_path(self, job_id: str) -> Path:
        return (self._directory / job_id / MANIFEST).resolve()

    def read_manifest(self, job_id: str) -> dict[str, Any] | None:
        """The manifest of a finished job, or None. Raises TransientJobError when there is no reading it."""
        try:
            manifest: dict[str, Any] = json.loads((self._directory / job_id / MANIFEST).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _unavailable(error) from error
        if not isinstance(manifest, dict) or not {"request_digest", "result"} <= manifest.keys():
            raise _unavailable(ValueError(f"{job_id}/{MANIFEST} is no manifest of reeld's"))
        return manifest

    @contextmanager
    def temporary_video(self, job_id: str) -> Iterator[Path]:
        """A name to write the video to, on the output directory's file system; what is left there is removed."""
        path = self._unfinished(f"{job_id}.part")
        try:
            yield path
        finally:
            with suppress(OSError):  # what cannot be removed must not hide how the writing went
                path.unlink()

    def keep_video(self, job_id: str, temporary: Path) -> StoredVideo:
        """Makes a written video durable under its name, which is its content's hash.

        So two daemons that hold the same job never overwrite each other: equal videos have one name, and of
        different ones the manifest names the one that counts.
        """
        try:
            digest = hashlib.sha256()
            with temporary.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                os.fsync(file.fileno())
            sha256 = digest.hexdigest()
            path = self._folder(job_id) / f"video-{sha256[:16]}.mp4"
            size = temporary.stat().st_size
            temporary.rename(path)
            _fsync_folder(path.parent)
            _fsync_folder(self._directory)  # the job's folder may be new
        except OSError as error:
            raise _unavailable(error) from error
        return StoredVideo(path=path.resolve(), sha256=sha256, bytes=size)

    def create_manifest(self, job_id: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Writes the manifest unless there is one. Returns the one that counts: this or the earlier one."""
        temporary = self._unfinished(f"{job_id}.manifest")
        try:
            folder = self._folder(job_id)
            with temporary.open("x", encoding="utf-8") as file:
                json.dump(manifest, file, ensure_ascii=False, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, folder / MANIFEST)  # fails when the name exists: the conditional create
            _fsync_folder(folder)
        except FileExistsError as error:
            earlier = self.read_manifest(job_id)
            if earlier is None:
                raise _unavailable(error) from error
            return earlier
        except OSError as error:
            raise _unavailable(error) from error
        finally:
            with suppress(OSError):
                temporary.unlink()
        return manifest

    def _folder(self, job_id: str) -> Path:
        folder = self._directory / job_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _unfinished(self, name: str) -> Path:
        self.open()
        return self._scratch.folder() / f"{uuid.uuid4().hex}-{name}"


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unavailable(error: Exception) -> TransientJobError:
    return TransientJobError(ErrorCode.STORAGE_UNAVAILABLE, f"output directory: {error}")
