"""`reeld install`: lays reeld out on this box, as a distribution's package would, and takes it away again.

Owns which file goes where and in which order. Every action is planned by what differs from how it shall be, so that a
second run has nothing to do, and `--dry-run` is the same plan, printed. An upgrade builds the new release and switches
to it while the old one serves, then has systemd drain what runs and start it again: it does that whatever becomes of
this process. Leaves out what a release is (`ops.release`).
"""

import filecmp
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ops import release
from ops.failure import CommandFailedError, UsageError

PREFIX = Path("/opt/reeld")
# From the checkout's systemd/ to where packages put theirs; what people change goes to /etc and is never touched.
_FILES = {
    "systemd/reeld@.service": "/usr/lib/systemd/system/reeld@.service",
    "systemd/reeld.target": "/usr/lib/systemd/system/reeld.target",
    "systemd/sysusers.d/reeld.conf": "/usr/lib/sysusers.d/reeld.conf",
    "systemd/tmpfiles.d/reeld.conf": "/usr/lib/tmpfiles.d/reeld.conf",
    "systemd/examples/reeld.toml": "/etc/reeld/reeld.toml.example",
    "systemd/examples/reeld.env": "/etc/reeld/reeld.env.example",
}
_COMMAND = Path("/usr/local/bin/reeld")
# The administrator's own: what is in it goes into each release; nothing here writes to it.
_WHEELS = Path("/usr/local/lib/reeld/wheels")


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do, and what is printed before it is done."""

    text: str
    do: Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Where everything goes: this system, or a tree below `root` for an image, in which nothing runs."""

    root: Path | None

    def path(self, absolute: str | Path) -> Path:
        return Path(absolute) if self.root is None else self.root / str(absolute).lstrip("/")

    @property
    def runs_systemd(self) -> bool:
        return self.root is None and Path("/run/systemd/system").is_dir()

    def check_rights(self) -> None:
        """Raises UsageError when this user may not do it."""
        if self.root is None and os.geteuid() != 0:
            raise UsageError("run it as root, or with --root DIR for a tree of your own")

    def tool(self, name: str, *arguments: str) -> None:
        """Runs systemd's tool on this box or tree. Raises CommandFailedError."""
        where = [] if self.root is None else [f"--root={self.root}"]
        _run(name, *where, *arguments)


def plan_install(box: Box, *, python: Path | None) -> Iterator[Action]:
    """What must be done so that this checkout is what the box runs. Raises UsageError."""
    box.check_rights()
    source = release.source_tree()
    wheels = sorted(box.path(_WHEELS).glob("*.whl"))
    name = release.release_name(source, wheels)
    target = box.path(PREFIX / "releases" / name)
    if not target.is_dir():
        chosen = release.interpreter(python)
        added = "".join(f", with {wheel.name}" for wheel in wheels)
        yield Action(
            f"build {target} on {chosen}{added}", lambda: release.build(source, target, python=chosen, wheels=wheels)
        )
    differing = {
        source / each: box.path(path)
        for each, path in _FILES.items()
        if not (box.path(path).is_file() and filecmp.cmp(source / each, box.path(path), shallow=False))
    }
    current = box.path(PREFIX / "current")
    switches = not current.is_symlink() or os.readlink(current) != f"releases/{name}"
    running = _running(box)
    if not (switches or any(path.suffix == ".service" for path in differing.values())):
        running = [unit for unit in running if _is_of_another_release(unit, name)]
    for file, path in differing.items():
        yield Action(f"write {path}", lambda file=file, path=path: _copy(file, path))  # type: ignore[misc]
    command = box.path(_COMMAND)
    if not command.is_symlink():
        yield Action(
            f"link {command} -> {PREFIX}/current/bin/reeld", lambda: _link(command, f"{PREFIX}/current/bin/reeld")
        )
    if differing or switches:
        yield Action("systemd-sysusers reeld.conf", lambda: box.tool("systemd-sysusers", "reeld.conf"))
        tmpfiles = "systemd-tmpfiles"
        yield Action(f"{tmpfiles} --create reeld.conf", lambda: box.tool(tmpfiles, "--create", "reeld.conf"))
    if box.runs_systemd and (differing or switches):
        yield Action("systemctl daemon-reload", lambda: _run("systemctl", "daemon-reload"))
    if switches:  # after all the rest: a run that did not come so far has everything to do again
        yield Action(f"link {current} -> releases/{name}", lambda: _link(current, f"releases/{name}"))
    if running:
        restart = ("systemctl", "restart", *running)
        yield Action(f"drain and start again: {' '.join(restart)}", lambda: _run(*restart))
    yield from _old_releases(box, keep=name)


def plan_uninstall(box: Box, *, purge: bool) -> Iterator[Action]:
    """What must be done so that nothing of reeld is left but configuration and videos; with `purge` the videos only."""
    box.check_rights()
    units = _running(box)
    if units:
        yield Action(f"drain: systemctl stop {' '.join(units)}", lambda: _run("systemctl", "stop", *units))
    enabled = [
        path
        for path in sorted(box.path("/etc/systemd/system").glob("*.target.wants/reeld*"))
        if path.is_symlink() and (path.name.startswith("reeld@") or path.name == "reeld.target")
    ]
    files = [box.path(path) for path in _FILES.values()]
    for path in (*enabled, *files, box.path(_COMMAND)):
        if path.is_symlink() or path.is_file():
            yield Action(f"remove {path}", lambda path=path: path.unlink())  # type: ignore[misc]
    trees = [PREFIX, Path("/var/cache/reeld")]
    if purge:
        trees += [Path("/etc/reeld"), Path("/var/log/reeld")]
        for path in sorted(box.path("/etc/credstore").glob("reeld.*")):
            yield Action(f"remove {path}", lambda path=path: path.unlink())  # type: ignore[misc]
        for path in sorted(box.path("/etc/systemd/system").glob("reeld@*.service.d")):
            yield Action(f"remove {path}", lambda path=path: shutil.rmtree(path))  # type: ignore[misc]
    for tree in map(box.path, trees):
        if tree.is_dir():
            yield Action(f"remove {tree}", lambda tree=tree: shutil.rmtree(tree))  # type: ignore[misc]
    if box.runs_systemd:
        yield Action("systemctl daemon-reload", lambda: _run("systemctl", "daemon-reload"))


def carry_out(actions: Iterator[Action], *, dry_run: bool, say: Callable[[str], None]) -> int:
    """Prints each action, and does it unless `dry_run`. Returns how many there were.

    The plan is complete before the first is done: each looks at the box as it was.
    """
    planned = list(actions)
    for action in planned:
        say(action.text)
        if not dry_run:
            action.do()
    return len(planned)


def _running(box: Box) -> list[str]:
    if not box.runs_systemd:
        return []
    states = "--state=active,activating,reloading,deactivating"
    listed = _run("systemctl", "list-units", "--plain", "--no-legend", "--full", states, "reeld@*.service")
    return [line.split()[0] for line in listed.splitlines() if line.strip()]


def _is_of_another_release(unit: str, name: str) -> bool:
    """Whether a unit's main process was started before the last switch: the run that switched was ended right then."""
    pid = _run("systemctl", "show", "--property=MainPID", "--value", unit).strip()
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:  # it waits to be started
        return False
    return f"{PREFIX}/releases/" in command and f"{PREFIX}/releases/{name}/" not in command


def _old_releases(box: Box, *, keep: str) -> Iterator[Action]:
    """All but the new one and the one before it, which is there to go back to; and what an interrupted run left."""
    folder = box.path(PREFIX / "releases")
    if not folder.is_dir():
        return
    found = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    partial = [path for path in found if path.suffix == ".partial" and path.stem != keep]
    whole = [path for path in found if path.suffix != ".partial" and path.name != keep]
    current = box.path(PREFIX / "current")
    used = current.resolve() if current.is_symlink() else None
    before = used if used in whole else (whole[-1] if whole else None)
    for path in [*partial, *(each for each in whole if each != before)]:
        yield Action(f"remove {path}", lambda path=path: shutil.rmtree(path))  # type: ignore[misc]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f"{target.name}.new")
    shutil.copyfile(source, new)
    new.chmod(0o644)
    new.replace(target)


def _link(path: Path, to: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(to)
    new.replace(path)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CommandFailedError(f"{command[0]} is not here: reeld install needs systemd's tools") from error
    if done.returncode != 0:
        raise CommandFailedError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr.strip()}")
    return done.stdout
