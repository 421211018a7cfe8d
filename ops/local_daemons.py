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
from daemon.logs import CONFIG_FILE, LAUNCHER_STACKS_FILE, STACKS_FILE
from daemon.rank_processes import rank_processes

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
    found: list[LocalDaemon] = []
    hidden = 0
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if not _may_be_ours(words) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            runtime = _runtime_of(process)
            if runtime is not None:
                found.append(_daemon(process, runtime))
        except psutil.AccessDenied:
            hidden += 1
        except psutil.Error:
            continue  # it ended meanwhile
    return sorted(found, key=lambda daemon: daemon.launcher.pid), hidden


def find_daemon(launcher_pid: int) -> LocalDaemon | None:
    """The daemon of a launcher; None when that process is none. Raises psutil.AccessDenied, psutil.NoSuchProcess."""
    launcher = psutil.Process(launcher_pid)
    runtime = _runtime_of(launcher)
    return None if runtime is None else _daemon(launcher, runtime)


def _may_be_ours(words: list[str]) -> bool:
    """`reeld run` and `python -m ops.cli run` are launchers."""
    return "run" in words and any(word == "ops.cli" or Path(word).name == "reeld" for word in words)


def _daemon(launcher: psutil.Process, runtime: str) -> LocalDaemon:
    root = Path(f"/proc/{launcher.pid}/root")
    there = root / runtime.lstrip("/")
    folder = there if there.exists() else Path(runtime)
    daemon = LocalDaemon(launcher, folder, unit=_unit(launcher), ranks=rank_processes(folder, launcher))
    with contextlib.suppress(OSError):
        daemon.config_path = (folder / CONFIG_FILE).read_text() or None
    return daemon


def _runtime_of(launcher: psutil.Process) -> str | None:
    """A launcher's folder, by the file for its stacks, which it holds open. None when this is no launcher."""
    # Not psutil's open_files, which leaves out what is not there as seen from here.
    try:
        for link in Path(f"/proc/{launcher.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                path = Path(os.readlink(link))
                if path.name == LAUNCHER_STACKS_FILE:
                    return str(path.parent)
    except PermissionError as error:
        raise psutil.AccessDenied(launcher.pid) from error
    except OSError:
        return None
    return None


def _unit(process: psutil.Process) -> str | None:
    """The systemd service that a process belongs to."""
    with contextlib.suppress(OSError):
        found = _UNIT.findall(Path(f"/proc/{process.pid}/cgroup").read_text())
        return found[-1] if found else None
    return None
