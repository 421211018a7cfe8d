"""Stacks on request: each rank, and the launcher, write theirs to a file when they get STACKS_SIGNAL.

Owns asking and reading. faulthandler's handler is C and needs no GIL, so a process that hangs inside a library
answers as well. Leaves out setting the handler (`daemon.logs`), and what is done about what is seen.
"""

import contextlib
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from daemon.signals import STACKS_SIGNAL
from daemon.stall import parse_stacks

# How long the processes have to write.
_ANSWER_SECONDS = 3.0


def ask_stacks(
    asked: Mapping[Any, tuple[psutil.Process, Path]], *, wake: bool = False
) -> dict[Any, list[dict[str, Any]]]:
    """The stacks of processes, by the keys of `asked`, as `daemon.stall.parse_stacks` gives them.

    Each comes with the file that it writes to. Empty for one that does not answer: a stopped process does not, unless
    `wake` lets it run. Nothing else happens to a process.
    """
    before: dict[Any, int] = {}
    for key, (process, file) in asked.items():
        # Before the file is there the signal would end the process.
        with contextlib.suppress(psutil.Error, OSError):
            before[key] = file.stat().st_size
            process.send_signal(STACKS_SIGNAL)
            if wake:
                process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + _ANSWER_SECONDS
    sizes: dict[Any, int] = {}
    while before and time.monotonic() < deadline:
        last, sizes = sizes, {key: _size(asked[key][1]) for key in before}
        if sizes == last and all(sizes[key] > before[key] for key in before):
            break
        time.sleep(0.2)  # a file that is being written offers no event to wait for
    return {key: parse_stacks(_tail(asked[key][1], before[key])) if key in before else [] for key in asked}


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _tail(file: Path, offset: int) -> str:
    """What was written behind `offset`: an earlier answer may be in the file, too."""
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            return opened.read().decode(errors="backslashreplace")
    except OSError:
        return ""
