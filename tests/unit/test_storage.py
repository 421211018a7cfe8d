"""What a job leaves on disk: one video that counts, one manifest, and no litter."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import ErrorCode, TransientJobError
from daemon.storage import MANIFEST, Storage
from daemon.writable import write_into

# POSIX message queues are a file system of the kernel's own, in which files are made and removed, but not linked.
_WITHOUT_LINKS = 'mount -t mqueue mqueue "$1"; exec "$2" -c "$3" "$1"'
_ASKS = """
import os, sys
from pathlib import Path
from daemon.writable import NoHardLinksError, write_into
folder = Path(sys.argv[1])
assert write_into(folder) == folder
try:
    write_into(folder, hard_links=True)
except NoHardLinksError as error:
    print(error.strerror)
print(os.listdir(folder))
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_video_is_named_by_its_content(tmp_path: Path) -> None:
    """The name holds the hash, so equal videos have one name and different ones two."""
    storage = Storage(tmp_path / "not" / "there" / "yet")
    stored = []
    for content in (b"one", b"two", b"one"):
        with storage.temporary_video("job-1") as temporary:
            temporary.write_bytes(content)
            stored.append(storage.keep_video("job-1", temporary))
    assert stored[0] == stored[2]
    assert stored[0].sha256 == hashlib.sha256(b"one").hexdigest()
    assert stored[0].path.name == f"video-{stored[0].sha256[:16]}.mp4"
    assert stored[0].path.is_absolute()
    assert (stored[0].bytes, stored[0].path.read_bytes()) == (3, b"one")
    assert stored[1].path.read_bytes() == b"two"
    assert names(stored[0].path.parent) == sorted({stored[0].path.name, stored[1].path.name})


def test_a_video_that_was_not_finished_is_removed(tmp_path: Path) -> None:
    """When encoding fails half way, no part file stays behind."""

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("encoder")

    with (
        pytest.raises(RuntimeError, match="encoder"),
        Storage(tmp_path).temporary_video("job-1") as temporary,
    ):
        fail(temporary)
    assert not temporary.exists()
    assert names(tmp_path) == [".unfinished"], "no job's folder before there is a video"


def test_the_first_manifest_counts(tmp_path: Path) -> None:
    """A second manifest does not replace the first; its writer gets the first one back."""
    storage = Storage(tmp_path)
    (tmp_path / "job-1").mkdir()
    assert storage.read_manifest("job-1") is None
    first = {"request_digest": "é", "result": {}}
    assert storage.create_manifest("job-1", first) == first
    assert storage.create_manifest("job-1", {"request_digest": "b", "result": {}}) == first
    assert storage.read_manifest("job-1") == first
    assert names(tmp_path / "job-1") == [MANIFEST]


@pytest.mark.parametrize("text", ["[]", "{}", '{"request_digest": "a"}', "{", "\\xff"])
def test_what_is_no_manifest_answers_no_job(tmp_path: Path, text: str) -> None:
    """A manifest file that reeld did not write is a fault of the storage, not a result."""
    (tmp_path / "job-1").mkdir()
    (tmp_path / "job-1" / MANIFEST).write_text(text)
    with pytest.raises(TransientJobError) as caught:
        Storage(tmp_path).read_manifest("job-1")
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE


def test_of_many_writers_at_once_one_wins_and_all_agree(tmp_path: Path) -> None:
    """Daemons that hold the same job agree on whose video counts, whoever comes first."""
    (tmp_path / "job-1").mkdir()
    writers = 8
    start, lock = threading.Barrier(writers), threading.Lock()
    seen: list[dict[str, Any]] = []

    def write(number: int) -> None:
        storage = Storage(tmp_path)
        start.wait()
        counted = storage.create_manifest("job-1", {"request_digest": str(number), "result": {"padding": "x" * 50_000}})
        with lock:
            seen.append(counted)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == writers
    assert all(manifest == seen[0] for manifest in seen)
    assert Storage(tmp_path).read_manifest("job-1") == seen[0]
    assert names(tmp_path / "job-1") == [MANIFEST]


def test_a_disk_that_says_no_is_a_transient_error(tmp_path: Path) -> None:
    """What the disk refuses is storage_unavailable, to be tried again."""
    (tmp_path / "file").write_text("not a folder")
    storage = Storage(tmp_path / "file")

    def open_video() -> None:
        with storage.temporary_video("job-1"):
            pass

    for attempt in (
        open_video,
        lambda: storage.keep_video("job-1", tmp_path / "missing.part"),
        lambda: storage.create_manifest("job-1", {}),
        lambda: storage.read_manifest("job-1"),
    ):
        with pytest.raises(TransientJobError) as caught:
            attempt()
        assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE


def test_a_torn_manifest_is_not_taken_for_none(tmp_path: Path) -> None:
    """A manifest that cannot be read is an error: generating again would break "the first one counts"."""
    (tmp_path / "job-1").mkdir()
    (tmp_path / "job-1" / MANIFEST).write_bytes(b'{"half')
    with pytest.raises(TransientJobError):
        Storage(tmp_path).read_manifest("job-1")


def test_a_manifest_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """When writing ends half way, nothing of it stays, and there is no manifest."""
    (tmp_path / "job-1").mkdir()
    with pytest.raises(TypeError):
        Storage(tmp_path).create_manifest("job-1", {"good": 1, "bad": object()})
    assert names(tmp_path / "job-1") == []


def test_a_file_system_without_hard_links_is_found_out_first(tmp_path: Path) -> None:
    """A manifest is made by a hard link (CIFS and some FUSE mounts have none): who checks the output directory is told
    so, before a job is generated in vain. Other directories need none."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", "--mount", "--ipc", *user, "sh", "-euc", _WITHOUT_LINKS]
    asked = subprocess.run(
        [*command, "sh", str(tmp_path), sys.executable, _ASKS], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr
    refusal, left = asked.stdout.splitlines()
    assert "no hard link" in refusal
    assert "Operation not permitted" in refusal
    assert left == "[]", "the check leaves nothing behind"


def test_where_hard_links_are_the_check_passes(tmp_path: Path) -> None:
    """On a disk as most are, and for a folder that is not there yet; nothing is made or left."""
    assert write_into(tmp_path / "not" / "there", hard_links=True) == tmp_path
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_into(tmp_path / "file" / "output", hard_links=True)
