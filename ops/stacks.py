"""`reeld stacks`: what each thread of a running daemon does now, without stopping it.

Owns choosing the daemon and how stacks look. Leaves out finding daemons (`ops.local_daemons`) and asking them
(`daemon.stacks`).
"""

import contextlib
import json
from typing import Any

import psutil

from daemon.stacks import ask_stacks
from ops.failure import CommandFailedError
from ops.local_daemons import LocalDaemon, find_daemons

_SHOWN = ("state", "phase", "job_id", "step", "steps", "last_progress_age_seconds", "stall_limit_seconds")


def stacks(name: str | None, *, as_json: bool) -> None:
    """Prints the stacks of every daemon of this box, or of the one that is called so.

    Raises CommandFailedError when there is none, or when not one process answered.
    """
    found = [collect(daemon) for daemon in choose(name)]
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for each in found:
            print("\n".join(text(each)))
    if not any(process["threads"] for each in found for process in each["processes"]):
        raise CommandFailedError("no process answered")


def choose(name: str | None) -> list[LocalDaemon]:
    """The daemons meant. Raises CommandFailedError when there is none."""
    daemons, hidden = find_daemons()
    chosen = [daemon for daemon in daemons if name is None or name in daemon.names]
    if chosen:
        return chosen
    there = "; ".join(_title(daemon) for daemon in daemons)
    rights = f"; {hidden} processes belong to others: try as root" if hidden else ""
    if name is None:
        raise CommandFailedError(f"no daemon runs on this box{rights}")
    raise CommandFailedError(f"no daemon is called {name}; there are: {there or 'none'}{rights}")


def collect(daemon: LocalDaemon) -> dict[str, Any]:
    """The stacks of one daemon: `{pid, unit, config, processes}`, of each process `{name, pid, threads, …}`."""
    files = daemon.stack_files()
    answers = ask_stacks(files)
    processes = []
    for name, (process, _) in files.items():
        rank = int(name.split()[1]) if name.startswith("rank") else None
        pulse = daemon.pulse(rank) if rank is not None else {}
        processes.append(
            {
                "name": name,
                "pid": process.pid,
                **{key: pulse[key] for key in _SHOWN if pulse.get(key) is not None},
                "threads": answers[name],
                "silent_because": None if answers[name] else _why_silent(process),
            }
        )
    about = {"pid": daemon.launcher.pid, "unit": daemon.unit, "config": daemon.config_path}
    return {**about, "processes": processes}


def text(found: dict[str, Any]) -> list[str]:
    """`collect`'s answer as lines: the innermost frame of each thread first."""
    unit = f"{found['unit']} " if found["unit"] else ""
    lines = [f"daemon {unit}pid {found['pid']} {found['config'] or ''}".rstrip()]
    for process in found["processes"]:
        said = ", ".join(f"{key} {process[key]}" for key in _SHOWN if key in process)
        lines += ["", f"{process['name']} (pid {process['pid']})" + (f": {said}" if said else "")]
        if process["silent_because"]:
            lines.append(f"  no answer: {process['silent_because']}")
        for thread in process["threads"]:
            lines.append(f"  thread {thread['thread']}" + (" (it got the signal)" if thread["current"] else ""))
            lines += [f"    {frame}" for frame in thread["frames"]]
    return [*lines, ""]


def _why_silent(process: psutil.Process) -> str:
    status = "gone"
    with contextlib.suppress(psutil.Error):
        status = process.status()
    if status == psutil.STATUS_STOPPED:
        return "it is stopped (SIGSTOP, or a debugger); `kill -CONT` lets it go on"
    if status == psutil.STATUS_DISK_SLEEP:
        return "it waits inside the kernel, for a disk or a driver"
    return f"it is {status}, it is only starting, or its handler is not set yet"


def _title(daemon: LocalDaemon) -> str:
    return f"pid {daemon.launcher.pid} {daemon.unit or daemon.config_path or ''}".strip()
