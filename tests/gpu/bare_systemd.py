"""A real systemd on a machine that runs none: the host's own files and devices, under a PID 1 of the test's own.

systemd-nspawn would want a root of its own, with the driver in it, and would keep the GPUs' devices away. Here systemd
is booted in namespaces of its own instead: it sees this host's files (what it and the tests write lies over them and
goes with it), all devices, and a control group in which its device rules hold. It starts only journald.

Needs root, Linux with cgroup2, and systemd's files (`benchmarks/gpu/carry.sh` brings them).
"""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.service.booted import SOURCE, Booted
from tests.service.machine import in_cgroups, own_cgroups, product, remove_cgroup

_BOOT_SECONDS = 30
# What packages that are carried as folders bring (`benchmarks/gpu/carry.sh`).
_CARRIED = Path("/opt/reeld-site")

_BOOT = """
set -e
# Among the namespaces in here: credentials are mounted in one of their own.
mount --make-rshared /
mount -t proc proc /proc
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
layer=$1; shift
for place in /etc /var /usr/lib/systemd /usr/lib/sysusers.d /usr/lib/tmpfiles.d /usr/local/bin; do
    mkdir -p "$place" "$layer/upper$place" "$layer/work$place"
    mount -t overlay overlay -o "lowerdir=$place,upperdir=$layer/upper$place,workdir=$layer/work$place" "$place"
done
for place in /run /srv /opt/reeld; do
    mkdir -p "$place"
    mount -t tmpfs -o mode=755 tmpfs "$place"
done
while [ "$1" != -- ]; do
    mkdir -p "$2"
    mount --bind "$1" "$2"
    shift 2
done
shift
# Nothing of what this host would start.
rm -rf /etc/systemd/system /usr/lib/systemd/system/*.wants
mkdir -p /etc/systemd/system
printf '[Unit]\\nRequires=systemd-journald.service\\nAfter=systemd-journald.service\\n' >/etc/systemd/system/test.target
exec "$@"
"""


class BareSystemd(Booted):
    """A booted systemd with reeld laid out, as a context manager. `binds`: (host's path, the path there)."""

    def __init__(self, folder: Path, *, binds: Sequence[tuple[Path, str]]) -> None:
        super().__init__()
        self._folder = folder
        self._binds = [*((source, target) for source, target, _ in product()), *binds]
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroups: list[Path] = []

    def __enter__(self) -> Self:
        self._cgroups = own_cgroups(f"reeld-{uuid.uuid4().hex[:8]}")
        try:
            self._boot()
            self._lay_out()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _boot(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            notified.bind(str(self._folder / "notify"))
            systemd = ["env", "-i", "container=other", f"NOTIFY_SOCKET={self._folder / 'notify'}"]
            systemd += ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "/usr/lib/systemd/systemd", "--system"]
            systemd += ["--unit=test.target", "--log-target=console"]
            binds = [str(path) for bind in self._binds for path in bind]
            command = ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--cgroup", "--ipc", "--uts", "--"]
            command += ["sh", "-c", _BOOT, "sh", str(self._folder / "layer"), *binds, "--", *systemd]
            with (self._folder / "console.log").open("wb") as console:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=in_cgroups(self._cgroups, os.getpid()),
                )
            self._wait_for_boot(notified)

    def _wait_for_boot(self, notified: socket.socket) -> None:
        assert self._process is not None
        notified.settimeout(1)
        deadline = time.monotonic() + _BOOT_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                said = notified.recv(4096).decode()
            except TimeoutError:
                continue
            if "READY=1" in said.splitlines():
                children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
                self._leader = int(children.split()[0])
                return
        console = (self._folder / "console.log").read_text(errors="replace")
        raise AssertionError(f"systemd did not boot: {self._process.poll()}\n{console[-3000:]}")

    def _lay_out(self) -> None:
        python = Path(sys.executable).resolve()
        home = "/opt/python/bin" if sys.base_prefix != "/usr" else str(python.parent)
        packages = ["/opt/reeld/site-packages", *([str(_CARRIED)] if _CARRIED.is_dir() else [])]
        self._install(SOURCE, python=python.name, home=home, packages=packages)

    def _end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)  # and with it, by --kill-child, everything inside
            self._process.wait(20)
        for cgroup in self._cgroups:
            remove_cgroup(cgroup)
