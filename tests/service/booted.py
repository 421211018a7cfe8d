"""A booted systemd of the test's own, as a test uses it: commands inside, the unit's properties, and its journal.

Owns starting it in control groups of its own, laying reeld out in it, entering it and ending it. This checkout and this
virtual environment are bound into it in place of the release that would be built. It shares the host's loopback, and
so reaches the test's broker. Leaves out what is booted (`tests.service.machine`: a root of its own, by systemd-nspawn;
`tests.gpu.bare_systemd`: this host's root, on a machine with GPUs).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from daemon.parent_death import child_gets

CHECKOUT = Path(__file__).resolve().parents[2]
# Where a machine has this checkout.
SOURCE = "/opt/reeld/src"
_BOOT_SECONDS = 60

# Stands in for a release as `reeld install` builds it (6 GB): this virtual environment's packages, a checkout's code.
_RELEASE = """
set -e
release=/opt/reeld/releases/{name}
[ ! -d $release ] || exit 0
mkdir -p $release/bin $release/lib/{python}/site-packages $release/share/doc/reeld
ln -s {home}/{python} $release/bin/python3
printf 'home = %s\\n' {home} >$release/pyvenv.cfg
printf '%s\\n' {paths} >$release/lib/{python}/site-packages/reeld.pth
printf '#!/bin/sh\\nexec "$(dirname "$(realpath "$0")")/python3" -m ops.cli "$@"\\n' >$release/bin/reeld
chmod 755 /opt $release/bin/reeld
[ ! -d /opt/python/lib ] || {{ echo /opt/python/lib >/etc/ld.so.conf.d/python.conf; ldconfig; }}
"""


class Booted(ABC):
    """A booted systemd, as a context manager. `binds`: more of the host, as (host's path, machine's, read-only)."""

    # Folders in the machine that hold what reeld needs.
    packages: Sequence[str] = ("/opt/reeld/site-packages",)

    def __init__(self, folder: Path, *, binds: Sequence[tuple[Path, str, bool]] = ()) -> None:
        self.name = f"reeld-{uuid.uuid4().hex[:8]}"
        # The machine's /var/lib/reeld, which a test can look into and put things into.
        self.state = folder / "state"
        self.console = folder / "console.log"
        self._folder = folder
        self._binds = [*_product(), (self.state, "/var/lib/reeld", False), *binds]
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._cgroups: list[Path] = []

    def __enter__(self) -> Self:
        self.state.mkdir()
        self._cgroups = _own_cgroups(self.name)
        try:
            self._boot()
            self.install()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @abstractmethod
    def _command(self, notify: str) -> list[str]:
        """What boots it, and says READY=1 to the socket at `notify`."""

    @abstractmethod
    def _leader_in(self, said: Sequence[str]) -> int | None:
        """The host's number of its PID 1, if what was said to the socket tells."""

    def run(self, *command: str, given: str | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Runs a command in the machine, as root. Fails on a status that is not 0, unless told not to."""
        enter = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        done = subprocess.run(
            [*enter, *clean, *command], input=given, capture_output=True, text=True, timeout=300, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def write(self, path: str, text: str, *, mode: str = "644") -> None:
        """Writes a file in the machine, as root."""
        self.run("sh", "-c", f'mkdir -p "$(dirname {path})"; umask 077; cat >{path}; chmod {mode} {path}', given=text)

    def systemctl(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return self.run("systemctl", *arguments, check=check)

    def show(self, unit: str) -> dict[str, str]:
        """All of a unit's properties. systemd leaves some out while they are empty."""
        lines = self.systemctl("show", unit).stdout.splitlines()
        return {"StatusText": ""} | dict(line.partition("=")[::2] for line in lines)

    def wait(self, unit: str, holds: Callable[[dict[str, str]], bool], *, timeout: float = 180) -> dict[str, str]:
        """The unit's properties once `holds` of them. Fails with its status and journal when that takes too long."""
        deadline = time.monotonic() + timeout
        while True:
            properties = self.show(unit)
            if holds(properties):
                return properties
            if time.monotonic() > deadline:
                raise AssertionError(f"not so in {timeout:g} s\n{self.explain(unit)}")
            time.sleep(0.2)  # systemd would tell by D-Bus; this host has no library for it

    def journal(self, unit: str) -> list[dict[str, Any]]:
        """The unit's journal: what reeld and systemd wrote, as journald's JSON."""
        self.run("journalctl", "--sync")  # what a process wrote last may not have been read yet
        lines = self.run("journalctl", "--unit", unit, "--output", "json", "--all", "--no-pager").stdout.splitlines()
        return [json.loads(line) for line in lines]

    def logs(self, unit: str) -> list[dict[str, Any]]:
        """What reeld itself wrote, each line parsed. Fails on one that does not parse."""
        ours = [entry for entry in self.journal(unit) if entry.get("SYSLOG_IDENTIFIER") == "reeld"]
        return [json.loads(entry["MESSAGE"]) for entry in ours]

    def explain(self, unit: str) -> str:
        """For people: how a unit stands, and the end of its journal."""
        status = self.systemctl("status", "--no-pager", "--lines=0", unit, check=False).stdout
        journal = self.run("journalctl", "--unit", unit, "--no-pager", "--lines=40", "--output=cat").stdout
        return status + "\n".join(line[:500] for line in journal.splitlines())

    def install(self, source: str = SOURCE, *options: str) -> str:
        """Runs `reeld install` from a checkout in the machine. Returns its output."""
        return self.run(self.reeld_of(source), "install", *options).stdout

    def reeld_of(self, source: str) -> str:
        """The command of a checkout in the machine, whose release is there afterwards and need not be built."""
        home = "/usr/bin" if sys.base_prefix == "/usr" else "/opt/python/bin"
        known = {
            "python": f"python{sys.version_info.major}.{sys.version_info.minor}",
            "home": home,
            "paths": " ".join((source, *self.packages)),
        }
        self.run("sh", "-s", given=_RELEASE.format(name="bare", **known))  # to ask for the name, and to run the command
        bare = "/opt/reeld/releases/bare/bin/python3"
        asked = "from ops import release; print(release.release_name(release.source_tree()))"
        name = self.run(bare, "-c", asked).stdout.strip()
        self.run("sh", "-s", given=_RELEASE.format(name=name, **known))
        self.run("rm", "-r", "/opt/reeld/releases/bare")
        return f"/opt/reeld/releases/{name}/bin/reeld"

    def _boot(self) -> None:
        notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with tempfile.TemporaryDirectory(prefix="reeld-machine-") as folder, notified:
            notified.bind(f"{folder}/notify")  # a socket's path has room for 107 bytes
            with self.console.open("wb") as console:
                self._process = subprocess.Popen(
                    self._command(f"{folder}/notify"),
                    env={**os.environ, "NOTIFY_SOCKET": f"{folder}/notify"},
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_in_cgroups(self._cgroups),
                )
            self._wait_for_boot(notified)

    def _wait_for_boot(self, notified: socket.socket) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _BOOT_SECONDS
        notified.settimeout(1)
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(TimeoutError):
                said = notified.recv(4096).decode().splitlines()
                self._leader = self._leader_in(said) or self._leader
                if "READY=1" in said and self._leader:
                    return
        raise AssertionError(f"systemd did not boot:\n{self.console.read_text(errors='replace')[-3000:]}")

    def _end(self) -> None:
        if self._process is not None:
            # At once, by its init: a shutdown in order waits for units, and init would outlive what started it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._leader or self._process.pid, signal.SIGKILL)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(20)
        for cgroup in self._cgroups:
            _remove_cgroup(cgroup)


def _product() -> list[tuple[Path, str, bool]]:
    """What a machine has of this host in place of a release: (host's path, machine's, read-only)."""
    found = [
        (CHECKOUT, SOURCE, True),
        (Path(sysconfig.get_paths()["purelib"]), "/opt/reeld/site-packages", True),
        (CHECKOUT / "tests" / "faults", "/srv/faults", True),
    ]
    if sys.base_prefix != "/usr":
        found.append((Path(sys.base_prefix), "/opt/python", True))
    return found


def _own_cgroups(name: str) -> list[Path]:
    """A control group below our own, in each hierarchy that systemd uses: two machines in one would get mixed up."""
    made = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controllers == "name=systemd":
            top = Path("/sys/fs/cgroup/systemd")
        elif number == "0":
            unified = Path("/sys/fs/cgroup/unified")
            top = unified if unified.is_dir() else Path("/sys/fs/cgroup")
        else:
            continue
        cgroup = top / path.lstrip("/") / name
        cgroup.mkdir()
        made.append(cgroup)
    return made


def _in_cgroups(cgroups: Sequence[Path]) -> Callable[[], None]:
    """For `preexec_fn`: the child enters these, and is ended when this process is gone."""
    files = [str(cgroup / "cgroup.procs") for cgroup in cgroups]
    end_with_us = child_gets(signal.SIGTERM)

    def enter() -> None:
        end_with_us()
        for file in files:
            descriptor = os.open(file, os.O_WRONLY)
            os.write(descriptor, str(os.getpid()).encode())
            os.close(descriptor)

    return enter


def _remove_cgroup(cgroup: Path) -> None:
    deepest_first = sorted(cgroup.rglob("*/"), key=lambda path: len(path.parts), reverse=True)
    for path in [*(each for each in deepest_first if each.is_dir()), cgroup]:
        for _ in range(50):  # the kernel takes a moment to see that the last process is gone
            try:
                path.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.1)
