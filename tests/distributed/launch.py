"""Starts the programs of this folder: a process, or ranks under torchrun, that must end well."""

import os
import subprocess
import sys
from pathlib import Path


def run_module(module: str, *arguments: Path | str, ranks: int = 1) -> None:
    """Runs `tests.distributed.<module>` on so many ranks. Fails with the end of its error output."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*([sys.executable] if ranks == 1 else torchrun), "-m", f"tests.distributed.{module}", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
