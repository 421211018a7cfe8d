"""Whether the worker can write into a folder: found by doing it, and without making the folder."""

import os
import tempfile
from pathlib import Path


class NoHardLinksError(OSError):
    """Raised when files can be written, and the file system links none; CIFS and some FUSE mounts are such."""


def write_into(folder: Path, *, hard_links: bool = False) -> Path:
    """Writes a file that is gone at once. Returns where: the nearest folder above, if this one is not there yet.

    With `hard_links`, which the output directory needs (`Storage.create_manifest`), the file is linked as well.
    Raises OSError.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    with tempfile.TemporaryFile(dir=place, prefix=".reeld-"):
        pass
    if hard_links:
        _link_in(place)
    return place


def _link_in(place: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=place, prefix=".reeld-") as file:
        link = f"{file.name}.link"
        try:
            os.link(file.name, link)
        except OSError as error:
            text = f"its file system makes no hard link ({error.strerror}); reeld creates a job's manifest by one"
            raise NoHardLinksError(error.errno, text) from error
        os.unlink(link)
