"""Scratch folders: a killed process leaves nothing for long, a living one is left alone."""

import subprocess
import sys
from pathlib import Path

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
    (first / "lock").unlink()
    first.rmdir()
    assert scratch.folder() != first
    assert scratch.folder().is_dir()
    scratch.close()
