"""`reeld tiny-model`: the tiny Wan models on disk.

Owns finding out whether they are there already, and keeping quiet while they are written. Leaves out the
weights (`parallel.tiny`).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ops.failure import CommandFailedError
from parallel.profile import ModelFolderError, check_model_folder, load_profile

NAMES = ("tiny-t2v", "tiny-i2v")  # what the demo runs


def write(directory: Path) -> list[Path]:
    """Writes every tiny model's folder into `directory` and returns their paths."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _quiet():
            # Imported here: torch and DiffSynth take seconds, and DiffSynth prints a banner when imported.
            from parallel.tiny import write_tiny_model

            return write_tiny_model(directory)
    except OSError as error:
        raise CommandFailedError(f"{error.filename or directory}: {error.strerror}") from error


def is_there(directory: Path) -> bool:
    """Whether the demo's two folders are there and whole."""
    try:
        for name in NAMES:
            check_model_folder(load_profile(name), directory / name)
    except ModelFolderError:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Sends file descriptors 1 and 2 to /dev/null: libraries in C print there too. Exceptions pass."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for copy, descriptor in zip(saved, (1, 2), strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
