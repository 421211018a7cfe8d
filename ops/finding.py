"""A finding of `reeld doctor`: what one check saw, and what to do about it."""

import os
import subprocess
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `fix` says what to do about it."""

    name: str
    state: State
    text: str
    fix: str = ""


def output_of(command: list[str], *, timeout_seconds: float = 20) -> str:
    """What a program prints. Raises OSError, or subprocess.SubprocessError when it fails or takes too long."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout_seconds,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    return done.stdout
