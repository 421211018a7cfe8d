"""The daemons that run on this box, found among its processes.

Owns telling a launcher and its ranks from other processes, and where they keep their files. Needs the rights to read a
process's environment: its user's, or root's. Leaves out what is asked of them.
"""

import contextlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from daemon.health import pulse_path
from daemon.logs import LAUNCHER_STACKS_FILE, RUNTIME_VARIABLE, STACKS_FILE

_UNIT = re.compile(r"/([^/]+\.service)")


@dataclass(slots=True)
class LocalDaemon:
    """A launcher with its ranks. `runtime` is its folder as seen from here: under systemd /tmp is its own."""

    launcher: psutil.Process
    runtime: Path
    config_path: str | None = None
    unit: str | None = None
    ranks: dict[int, psutil.Process] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """What it may be called on the command line: a pid, its configuration's name, its unit or its instance."""
        found = {str(self.launcher.pid), *(str(each.pid) for each in self.ranks.values())}
        if self.config_path:
            found |= {self.config_path, Path(self.config_path).stem}
        if self.unit:
            stem = self.unit.removesuffix(".service")
            found |= {self.unit, stem, stem.rpartition("@")[2]}
        return found

    def stack_files(self) -> dict[str, tuple[psutil.Process, Path]]:
        """Whom to ask for stacks, and where each writes them."""
        files = {"launcher": (self.launcher, self.runtime / LAUNCHER_STACKS_FILE)}
        for rank, process in sorted(self.ranks.items()):
            files[f"rank {rank}"] = (process, self.runtime / STACKS_FILE.format(rank=rank))
        return files

    def pulse(self, rank: int) -> dict[str, Any]:
        """The rank's own record of what it does; empty when it has none."""
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(pulse_path(self.runtime, rank).read_bytes())
            if isinstance(record, dict):
                return record
        return {}


def find_daemons() -> tuple[list[LocalDaemon], int]:
    """Every daemon of this box, and how many processes of reeld may not be looked into."""
    found: dict[int, LocalDaemon] = {}
    hidden = 0
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if not _may_be_ours(words) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if "RANK" in environment and RUNTIME_VARIABLE in environment:
                launcher = psutil.Process(int(environment["REELD_LAUNCHER"]))
                daemon = _of(found, launcher, environment[RUNTIME_VARIABLE])
                daemon.ranks[int(environment["RANK"])] = process
                daemon.config_path = daemon.config_path or environment.get("REELD_CONFIG")
            elif "RANK" not in environment and (runtime := _runtime_of(process)) is not None:
                _of(found, process, runtime)
        except psutil.AccessDenied:
            hidden += 1
        except (psutil.Error, KeyError, ValueError):
            continue  # it ended meanwhile, or only looks like one of ours
    return sorted(found.values(), key=lambda daemon: daemon.launcher.pid), hidden


def _may_be_ours(words: list[str]) -> bool:
    """`python -m daemon` is a rank, `reeld run` and `python -m ops.cli run` are launchers."""
    if words[1:] and words[-1] == "daemon" and "-m" in words:
        return True
    return "run" in words and any(word == "ops.cli" or Path(word).name == "reeld" for word in words)


def _of(found: dict[int, LocalDaemon], launcher: psutil.Process, runtime: str) -> LocalDaemon:
    if launcher.pid not in found:
        root = Path(f"/proc/{launcher.pid}/root")
        there = root / runtime.lstrip("/")
        found[launcher.pid] = LocalDaemon(launcher, there if there.exists() else Path(runtime), unit=_unit(launcher))
    return found[launcher.pid]


def _runtime_of(launcher: psutil.Process) -> str | None:
    """A launcher's folder, by the file for its stacks, which it holds open. None when this is no launcher."""
    # Not psutil's open_files, which leaves out what is not there as seen from here.
    try:
        opened = [os.readlink(link) for link in Path(f"/proc/{launcher.pid}/fd").iterdir()]
    except PermissionError as error:
        raise psutil.AccessDenied(launcher.pid) from error
    except OSError:
        return None
    return next((str(Path(path).parent) for path in opened if Path(path).name == LAUNCHER_STACKS_FILE), None)


def _unit(process: psutil.Process) -> str | None:
    """The systemd service that a process belongs to."""
    with contextlib.suppress(OSError):
        found = _UNIT.findall(Path(f"/proc/{process.pid}/cgroup").read_text())
        return found[-1] if found else None
    return None
