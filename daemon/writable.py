"""Whether the worker can write into a folder: found by doing it, and without making the folder."""

import tempfile
from pathlib import Path


def write_into(folder: Path) -> Path:
    """Writes a file that is gone at once. Returns where: the nearest folder above, if this one is not there yet.

    Raises OSError.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    with tempfile.TemporaryFile(dir=place, prefix=".reeld-"):
        pass
    return place
