"""The RabbitMQ versions that reeld is tested on: the distribution's, and those of newer Debians in roots of their own.

    python -m tests.brokers [PYTEST ARGUMENT ...]

runs the tests that need a broker on each of them, one after the other, and prints what passed where. Owns building
the roots (with mmdebstrap, once, in $REELD_TEST_CACHE or ~/.cache/reeld) and entering them (a mount namespace and
chroot). Leaves out how a node is started (`ops.private_broker`).
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT_VARIABLE = "REELD_TEST_BROKER_ROOT"
_MIRROR = os.environ.get("REELD_DEBIAN_MIRROR", "http://deb.debian.org/debian")
_SUITES = ("trixie", "forky")
_DISTRIBUTION = "distribution"

# Sees its own root only, and of ours the folders that the node writes to, each under the name it has outside.
_ENTER = """
set -e
root=$1; shift
mount --rbind /dev "$root/dev"
mount --rbind /proc "$root/proc"
while [ "$1" != -- ]; do
    top="$root/$(echo "$1" | cut -d/ -f2)"
    case "$top" in
        "$root"/usr | "$root"/lib* | "$root"/bin | "$root"/sbin | "$root"/etc | "$root"/var) ;;
        *) mkdir -p "$top"; mountpoint -q "$top" || mount -t tmpfs tmpfs "$top" ;;
    esac
    mkdir -p "$root$1"
    mount --bind "$1" "$root$1"
    shift
done
shift
cd /
exec chroot "$root" "$@"
"""


def enter_root() -> Callable[[Sequence[Path]], list[str]] | None:
    """How a node of this run is started: in the root that the environment names, or (None) on this system."""
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        return None
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]

    def enter(folders: Sequence[Path]) -> list[str]:
        return [*unshare, "sh", "-c", _ENTER, "sh", root, *map(str, folders), "--"]

    return enter


def root_of(suite: str) -> Path:
    """The root of a Debian suite with its RabbitMQ, built if it is not there. Takes about a minute, and 230 MB."""
    cache = Path(os.environ.get("REELD_TEST_CACHE", Path.home() / ".cache" / "reeld")) / "brokers"
    root = cache / suite
    if root.is_dir():
        return root
    if shutil.which("mmdebstrap") is None:
        sys.exit("tests.brokers: needs mmdebstrap: apt-get install --no-install-recommends mmdebstrap")
    cache.mkdir(parents=True, exist_ok=True)
    print(f"building {root} from {_MIRROR}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{suite}-") as folder:
        made = Path(folder) / "root"
        command = ["mmdebstrap", "--quiet", "--variant=essential", "--include=rabbitmq-server"]
        options = ['APT::Install-Recommends "false"', 'Acquire::Check-Valid-Until "false"']
        command += [f"--aptopt={option}" for option in options]
        subprocess.run([*command, suite, str(made), _MIRROR], check=True)
        hosts = made / "etc" / "hosts"
        if not hosts.exists():
            hosts.write_text("127.0.0.1 localhost\n::1 localhost\n")
        with hosts.open("a") as file:  # erlang looks its own host up
            file.write(f"127.0.1.1 {platform.node()}\n")
        made.rename(root)
    return root


def _version(environment: dict[str, str]) -> str:
    """RabbitMQ's version, asked of a running node."""
    script = (
        "import sys, pathlib, tests.brokers as b; from ops.private_broker import PrivateBroker\n"
        "with PrivateBroker(pathlib.Path(sys.argv[1]), plugins=(), enter=b.enter_root()) as node:\n"
        "    print(node.ctl('version').split()[-1])"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", script, folder], env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        sys.exit(f"tests.brokers: no node starts: {done.stderr[-2000:]}")
    return done.stdout.strip()


def _run(name: str, arguments: list[str]) -> tuple[str, int]:
    """Runs the tests on one broker. Returns a line about it and pytest's exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop(ROOT_VARIABLE, None)
    if name != _DISTRIBUTION:
        environment[ROOT_VARIABLE] = str(root_of(name))
    version = _version(environment)
    print(f"\n=== RabbitMQ {version} ({name}) ===", flush=True)
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-n", "2", "-m", "broker", f"--junitxml={report.name}", *arguments]
        status = subprocess.run(command, env=environment, check=False).returncode
        suite = next(ElementTree.parse(report.name).getroot().iter("testsuite"))
    counted = ", ".join(f"{suite.get(key)} {key}" for key in ("tests", "failures", "errors", "skipped"))
    return f"RabbitMQ {version} ({name}): {counted}, {float(suite.get('time', 0)):.0f} s", status


def main(arguments: list[str]) -> int:
    results = [_run(name, arguments) for name in (_DISTRIBUTION, *_SUITES)]
    print("\n" + "\n".join(line for line, _ in results))
    return max(status for _, status in results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
