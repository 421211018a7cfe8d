"""Whether a model folder's files are, byte for byte, what its SHA256SUMS says; for who asks for it.

Owns reading the list (as `sha256sum` writes it) and sharing the work out: each rank reads its part of the files. Leaves
out what a file must hold to be the right one (`profile.py`).
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from parallel.profile import ModelFiles, ModelFolderError

_LINE = re.compile(r"^\\?([0-9a-fA-F]{64}) [ *](.+)$")


def verify_checksums(
    files: ModelFiles, *, rank: int, world_size: int, on_file: Callable[[Path], None] = lambda _path: None
) -> None:
    """Called by every rank. Checks this rank's part of the profile's files; `on_file` hears of each before it is read.

    Raises ModelFolderError, one line, when the list is missing or lacks a file, or a file is not what it says.
    """
    sums = _read_list(files.folder / "SHA256SUMS")
    paths = [path for part in files.paths.values() for path in part]
    for path in paths[rank::world_size]:
        name = path.relative_to(files.folder).as_posix()
        if name not in sums:
            raise ModelFolderError(f"{files.folder / 'SHA256SUMS'}: does not list {name}")
        on_file(path)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelFolderError(f"{path}: cannot be read ({error.strerror})") from error
        if found != sums[name]:
            raise ModelFolderError(f"{path}: its SHA-256 is {found}, SHA256SUMS says {sums[name]}; download it again")


def _read_list(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ModelFolderError(
            f"{path}: {reason}; make it with `sha256sum` in the model's folder, or set checksums = false"
        ) from error
    sums = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.match(line)
        if match is None:
            raise ModelFolderError(f"{path}: line {number} is not as `sha256sum` writes it")
        sums[match[2].removeprefix("./")] = match[1].lower()
    return sums
