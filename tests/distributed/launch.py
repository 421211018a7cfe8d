"""Starts the programs of this folder: a process, or ranks, that must end well."""

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

_TIMEOUT_SECONDS = 280


def run_module(module: str, *arguments: Path | str, ranks: int = 1) -> None:
    """Runs `tests.distributed.<module>` on so many ranks, forked from the run's nursery. Fails with the end of what it
    printed."""
    with tempfile.NamedTemporaryFile() as output:
        request = {"module": module, "arguments": list(map(str, arguments)), "ranks": ranks, "output": output.name}
        statuses = _nursery().ask(request)
        assert not any(statuses), f"{module} {statuses}\n{Path(output.name).read_text()[-3000:]}"


def run_reference(module: str, *arguments: Path | str) -> None:
    """Runs `tests.distributed.<module>` in a process of its own, which imports only what it asks for."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.distributed.{module}", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]


class _Nursery:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.nursery"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.end)
        # xfuser and others print while they are imported.
        while (line := self._read()) != "ready\n":
            assert line, "the nursery ended while it imported"

    def ask(self, request: dict[str, object]) -> list[int]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: list[int] = json.loads(self._read())
        return answer

    def _read(self) -> str:
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], _TIMEOUT_SECONDS)
        if not ready:
            self.end()
            _nursery.cache_clear()
            raise AssertionError(f"no answer from the nursery in {_TIMEOUT_SECONDS} s")
        return stdout.readline()

    def end(self) -> None:
        """The ranks of a request that hangs end with it: they are in sessions of their own, and known by parent."""
        if self._process.poll() is not None:
            return
        import psutil

        for child in psutil.Process(self._process.pid).children(recursive=True):
            child.kill()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@functools.cache
def _nursery() -> _Nursery:
    return _Nursery()
