"""A real systemd on a machine that runs none: the host's own files and devices, under a PID 1 of the test's own.

systemd-nspawn would want a root of its own, with the driver in it, and would keep the GPUs' devices away. Here systemd
is booted in namespaces of its own instead: it sees this host's files (what it and the tests write lies over them and
goes with it), all devices, and a control group in which its device rules hold. It starts only journald.

Needs root, Linux with cgroup2, and systemd's files (`benchmarks/gpu/carry.sh` brings them).
"""

from collections.abc import Sequence
from pathlib import Path

from tests.service.booted import Booted

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
    """A booted systemd with reeld laid out, as a context manager. All that is bound can be written to."""

    # The second is what `benchmarks/gpu/carry.sh` brings.
    packages = ("/opt/reeld/site-packages", "/opt/reeld-site")

    def _command(self, notify: str) -> list[str]:
        systemd = ["env", "-i", "container=other", f"NOTIFY_SOCKET={notify}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        systemd += ["/usr/lib/systemd/systemd", "--system", "--unit=test.target", "--log-target=console"]
        binds = [str(path) for source, target, _ in self._binds for path in (source, target)]
        command = ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--cgroup", "--ipc", "--uts", "--"]
        return [*command, "sh", "-c", _BOOT, "sh", str(self._folder / "layer"), *binds, "--", *systemd]

    def _leader_in(self, said: Sequence[str]) -> int | None:
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if "READY=1" in said else None
