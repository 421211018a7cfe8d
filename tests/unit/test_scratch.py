"""Scratch folders: a killed process leaves nothing for long; a living one, and what is not ours, is left alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.job import is_job_id
from daemon.scratch import Scratch

_HOLDER = (
    "import sys; from pathlib import Path; from daemon.scratch import Scratch;"
    "folder = Scratch(Path(sys.argv[1])).folder(); (folder / 'video.part').write_bytes(b'half');"
    "print(folder, flush=True); sys.stdin.read()"
)


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """The next daemon removes the part files of a killed one, and leaves those of a daemon at work alone."""
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        theirs = Path(holder.stdout.readline().strip())
        assert (theirs / "video.part").exists()
        ours = Scratch(tmp_path)
        assert ours.folder() != theirs
        assert (theirs / "video.part").exists(), "its process lives"
        holder.kill()
        holder.wait(20)
        again = Scratch(tmp_path)
        again.folder()
        assert not theirs.exists()
        again.close()
        ours.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_removed_is_made_anew(tmp_path: Path) -> None:
    """An operator who cleans up does not stop the daemon."""
    scratch = Scratch(tmp_path / "not" / "there")
    first = scratch.folder()
    assert scratch.folder() == first
    shutil.rmtree(first)
    assert scratch.folder() != first
    assert scratch.folder().is_dir()
    scratch.close()


@pytest.mark.parametrize("name", ["someones-data", "a" * 31, "A" * 32, "a" * 33, "a" * 32 + "\n", f"{'a' * 32}.d"])
def test_only_what_reeld_itself_made_is_swept(tmp_path: Path, name: str) -> None:
    """The directory may be /tmp or a whole disk: a folder of another name stays, whatever lies in it."""
    ours = Scratch(tmp_path)
    (lock,) = ours.folder().iterdir()
    for file in {lock.name, "lock"}:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).touch()
    Scratch(tmp_path).folder()
    assert sorted(os.listdir(tmp_path / name)) == sorted({lock.name, "lock"})


def test_no_jobs_folder_meets_what_is_there(tmp_path: Path) -> None:
    """Inputs are staged beside the lock, in a folder with the job's id for its name; `lock` is an id as any other."""
    folder = Scratch(tmp_path).folder()
    assert is_job_id("lock")
    (folder / "lock").mkdir()
    assert not [path.name for path in folder.iterdir() if is_job_id(path.name) and not path.is_dir()]
