"""A machine of the test's own that runs a real systemd: booted by systemd-nspawn in under a second, thrown away after.

Its root is a minimal Debian of this host's release, made once by mmdebstrap (in $REELD_TEST_CACHE or ~/.cache/reeld);
what a machine writes stays in its memory. `reeld install` lays the product out in it; this checkout and this virtual
environment are bound into it in place of the release that would be built. It shares the host's loopback, and so reaches
the test's broker.

Needs root, systemd-container and mmdebstrap (`make install` brings both). Where they are missing, tests fail.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.service.booted import SOURCE, Booted

CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGES = ["systemd", "dbus", "python3", "ca-certificates"]
# What a Python that was built by hand, torch and ffmpeg link to.
_PACKAGES += ["libstdc++6", "libgomp1", "libssl3", "libffi8", "zlib1g", "libbz2-1.0", "liblzma5", "libsqlite3-0"]
_BOOT_SECONDS = 60
_prctl = ctypes.CDLL(None, use_errno=True).prctl  # bound here: nothing may be looked up after a fork
_PR_SET_PDEATHSIG = 1


class Machine(Booted):
    """A booted machine, as a context manager. `binds`: more of the host, as (host's path, machine's, read-only)."""

    def __init__(self, folder: Path, *, binds: Sequence[tuple[Path, str, bool]] = ()) -> None:
        super().__init__()
        self.name = f"reeld-{uuid.uuid4().hex[:8]}"
        # The machine's /var/lib/reeld, which a test can look into and put things into.
        self.state = folder / "state"
        self.console = folder / "console.log"
        self._binds = list(binds)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroups: list[Path] = []

    def __enter__(self) -> Self:
        root = root_of(_codename())
        self.state.mkdir()
        self._cgroups = own_cgroups(self.name)
        try:
            self._boot(root)
            self.install()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _boot(self, root: Path) -> None:
        notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with tempfile.TemporaryDirectory(prefix="reeld-machine-") as folder, notified:
            notified.bind(f"{folder}/notify")  # a socket's path has room for 107 bytes
            command = ["systemd-nspawn", "--quiet", "-b", "-D", str(root), "--volatile=overlay", "--register=no"]
            command += ["--keep-unit", "--notify-ready=yes", "--console=pipe", f"--machine={self.name}"]
            for source, target, read_only in [*product(), (self.state, "/var/lib/reeld", False), *self._binds]:
                command.append(f"--bind{'-ro' if read_only else ''}={source}:{target}")
            with self.console.open("wb") as console:
                self._process = subprocess.Popen(
                    command,
                    env={**os.environ, "NOTIFY_SOCKET": f"{folder}/notify"},
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=in_cgroups(self._cgroups, os.getpid()),
                )
            self._wait_for_boot(notified)

    def _wait_for_boot(self, notified: socket.socket) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _BOOT_SECONDS
        notified.settimeout(1)
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(TimeoutError):
                lines = notified.recv(4096).decode().splitlines()
                for line in lines:
                    if line.startswith("X_NSPAWN_LEADER_PID="):
                        self._leader = int(line.partition("=")[2])
                if "READY=1" in lines and self._leader:
                    return
        pytest.fail(f"systemd did not boot in systemd-nspawn:\n{self.console.read_text(errors='replace')[-3000:]}")

    def install(self, source: str = SOURCE, *options: str) -> str:
        """Runs `reeld install` from a checkout in the machine, whose release need not be built. Returns its output."""
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        home = "/usr/bin" if sys.base_prefix == "/usr" else "/opt/python/bin"
        return self._install(source, *options, python=python, home=home, packages=["/opt/reeld/site-packages"])

    def _end(self) -> None:
        if self._process is not None:
            # At once, by its init: a shutdown in order waits for units, and init would outlive a killed systemd-nspawn.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._leader or self._process.pid, signal.SIGKILL)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(20)
        for cgroup in self._cgroups:
            remove_cgroup(cgroup)


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


def product() -> list[tuple[Path, str, bool]]:
    """What a machine has of this host in place of a release: (host's path, machine's, read-only)."""
    found = [
        (CHECKOUT, SOURCE, True),
        (Path(sysconfig.get_paths()["purelib"]), "/opt/reeld/site-packages", True),
        (CHECKOUT / "tests" / "faults", "/srv/faults", True),
    ]
    if sys.base_prefix != "/usr":
        found.append((Path(sys.base_prefix), "/opt/python", True))
    return found


def own_cgroups(name: str) -> list[Path]:
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


def in_cgroups(cgroups: Sequence[Path], parent: int) -> Callable[[], None]:
    files = [str(cgroup / "cgroup.procs") for cgroup in cgroups]

    def enter() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
        for file in files:
            descriptor = os.open(file, os.O_WRONLY)
            os.write(descriptor, str(os.getpid()).encode())
            os.close(descriptor)

    return enter


def remove_cgroup(cgroup: Path) -> None:
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
