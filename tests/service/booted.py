"""A booted systemd, as a test uses it: commands inside, the unit's properties, and its journal.

Owns entering it and laying reeld out in it. Leaves out how it was booted (`tests.service.machine`, by systemd-nspawn;
`tests.gpu.bare_systemd`, on a machine with GPUs).
"""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

# Where a machine has this checkout.
SOURCE = "/opt/reeld/src"

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


class Booted:
    """A booted systemd, whose PID 1 is this host's process `leader`."""

    def __init__(self) -> None:
        self._leader = 0

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

    def _install(self, source: str, *options: str, python: str, home: str, packages: Sequence[str]) -> str:
        """Runs `reeld install` from a checkout in the machine, whose release need not be built. Returns its output.

        python: an interpreter's name in the folder `home`; packages: folders that hold what reeld needs.
        """
        known = {"python": python, "home": home, "paths": " ".join((source, *packages))}
        self.run("sh", "-s", given=_RELEASE.format(name="bare", **known))  # to ask for the name, and to run the command
        bare = "/opt/reeld/releases/bare/bin/python3"
        asked = "from ops import release; print(release.release_name(release.source_tree()))"
        name = self.run(bare, "-c", asked).stdout.strip()
        self.run("sh", "-s", given=_RELEASE.format(name=name, **known))
        self.run("rm", "-r", "/opt/reeld/releases/bare")
        return self.run(f"/opt/reeld/releases/{name}/bin/reeld", "install", *options).stdout
