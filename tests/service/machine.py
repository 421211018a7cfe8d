"""A machine of the test's own that runs a real systemd: booted by systemd-nspawn in under a second, thrown away after.

Its root is a minimal Debian of this host's release, made once by mmdebstrap (in $REELD_TEST_CACHE or ~/.cache/reeld);
what a machine writes stays in its memory. `reeld install` lays the product out in it.

Needs root, systemd-container and mmdebstrap (`make install` brings both). Where they are missing, tests fail.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.service.booted import Booted

_PACKAGES = ["systemd", "dbus", "python3", "ca-certificates"]
# What a Python that was built by hand, torch and ffmpeg link to.
_PACKAGES += ["libstdc++6", "libgomp1", "libssl3", "libffi8", "zlib1g", "libbz2-1.0", "liblzma5", "libsqlite3-0"]


class Machine(Booted):
    """A booted machine, as a context manager."""

    def _command(self, notify: str) -> list[str]:
        command = ["systemd-nspawn", "--quiet", "-b", "-D", str(root_of(_codename())), "--volatile=overlay"]
        command += ["--register=no", "--keep-unit", "--notify-ready=yes", "--console=pipe", f"--machine={self.name}"]
        return command + [
            f"--bind{'-ro' if read_only else ''}={source}:{target}" for source, target, read_only in self._binds
        ]

    def _leader_in(self, said: Sequence[str]) -> int | None:
        told = [line for line in said if line.startswith("X_NSPAWN_LEADER_PID=")]
        return int(told[0].partition("=")[2]) if told else None


def root_of(suite: str) -> Path:
    """The root of a Debian suite with systemd, made if it is not there. Takes up to a minute and a half, and 220 MB."""
    missing = [name for name in ("systemd-nspawn", "mmdebstrap", "nsenter") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        wanted = ["root"] * (os.geteuid() != 0) + missing
        pytest.fail(f"the tests on a booted systemd need {', '.join(wanted)}: run `make install`, and as root")
    cache = Path(os.environ.get("REELD_TEST_CACHE", Path.home() / ".cache" / "reeld")) / "service"
    root = cache / f"{suite}-{zlib.crc32(' '.join(_PACKAGES).encode()):08x}"
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{suite}-") as folder:
        made = Path(folder) / "root"
        command = ["mmdebstrap", "--quiet", "--variant=essential", f"--include={','.join(_PACKAGES)}"]
        mirror = os.environ.get("REELD_DEBIAN_MIRROR")
        done = subprocess.run(
            [*command, suite, str(made), *([mirror] if mirror else [])], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.fail(f"mmdebstrap could not make the root of {suite}:\n{done.stderr[-3000:]}")
        made.chmod(0o755)
        with contextlib.suppress(OSError):  # another run was faster
            made.rename(root)
    return root


def _codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    pytest.fail("/etc/os-release names no VERSION_CODENAME: the tests on a booted systemd need Debian or Ubuntu")
