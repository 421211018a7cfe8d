"""A journald of the test's own with rsyslog or syslog-ng behind it, as systemd/logs/ configures them.

They run in mount and process namespaces of their own, where /run and /var/log are private: no logger of the machine is
touched, and all end with the test. Needs root, as the tests of the unit do.
"""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.service.tools import LIBRARIES, ROOT, TOOLS, tool, tool_environment

LOGS = ROOT / "systemd/logs"

# Its arguments: the folder that becomes /var/log, the file to feed to the journal, then the logger's command line.
_SCRIPT = """
set -eu
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal /run/log/journal /run/systemd/journald.conf.d
printf '[Journal]\\nStorage=volatile\\nReadKMsg=no\\n' >/run/systemd/journald.conf.d/10-test.conf
[ -z "$DROP_IN" ] || cp "$DROP_IN" /run/systemd/journald.conf.d/20-reeld.conf
mount --bind "$1" /var/log
/lib/systemd/systemd-journald &
until [ -S /run/systemd/journal/stdout ]; do sleep 0.05; done
systemd-cat --identifier=reeld <"$2"
# Somebody else's line, which is none of reeld's.
echo 'Started reeld@test.service.' | systemd-cat --identifier=systemd
shift 2
"$@" &
read -r _ || true  # until the test has seen enough
"""


def _rsyslog(folder: Path) -> list[str]:
    config = folder / "main.conf"
    config.write_text(f'global(workDirectory="{folder}")\ninclude(file="{LOGS}/rsyslog.conf")\n')
    return [tool("rsyslogd"), "-n", "-i", f"{folder}/pid", "-f", str(config), "-M", f"{LIBRARIES}/rsyslog"]


def _syslog_ng(folder: Path) -> list[str]:
    config = folder / "main.conf"
    config.write_text(f'@version: 3.38\n@include "{LOGS}/syslog-ng.conf"\n')
    state = [f"--persist-file={folder}/persist", f"--pidfile={folder}/pid", f"--control={folder}/control"]
    (modules,) = (TOOLS / "usr/lib/syslog-ng").glob("[0-9]*")
    return [tool("syslog-ng"), "--foreground", "--no-caps", f"--cfgfile={config}", *state, f"--module-path={modules}"]


class Pipeline:
    """A journald and a logger that run, and what the logger writes under /var/log/reeld."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self._folder = folder
        self._process = process

    def found(self) -> dict[str, list[str]]:
        """The lines of each file."""
        # Not splitlines(), which also takes a separator within a line for an end.
        files = sorted((self._folder / "log/reeld").glob("*.*"))
        return {path.name: path.read_text().split("\n")[:-1] for path in files}

    def wait_lines(self, expected: int, *, timeout: float = 60) -> dict[str, list[str]]:
        """What is found once there are so many lines in all, or when the time is up."""
        deadline = time.monotonic() + timeout
        while sum(map(len, (found := self.found()).values())) < expected and time.monotonic() < deadline:
            assert self._process.poll() is None, (self._folder / "output").read_text()
            time.sleep(0.1)  # a growing file offers no event to wait for
        return found

    def feed(self, line: str) -> None:
        """One more line that reeld prints."""
        self._run("systemd-cat", "--identifier=reeld", given=f"{line}\n")

    def logrotate(self, logger: str) -> None:
        """Runs the real one by our configuration, with a systemctl that knows the logger's unit and no other."""
        programs = self._folder / "bin"
        programs.mkdir()
        (programs / "systemctl").write_text(
            f'#!/bin/sh\n[ "$*" = "kill -s HUP {logger}.service" ] && kill -s HUP "$(cat {self._folder}/pid)"\n'
        )
        (programs / "systemctl").chmod(0o755)
        config = self._folder / "logrotate.conf"
        config.write_text((LOGS / "logrotate.conf").read_text())
        config.chmod(0o644)
        state = f"--state={self._folder}/state"
        self._run("env", f"PATH={programs}:/usr/bin:/bin", "/usr/sbin/logrotate", "--force", state, str(config))

    def _run(self, *command: str, given: str = "") -> None:
        unshare = self._process.pid
        leader = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().strip()
        enter = ["nsenter", "--target", leader, "--mount", "--pid", "--"]
        done = subprocess.run([*enter, *command], input=given, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def pipeline(
    logger: str,
    folder: Path,
    *,
    journal: Sequence[str] = (),
    files: Sequence[Path] = (),
    drop_in: bool = True,
) -> Iterator[Pipeline]:
    """`journal`: lines that reeld prints, `files`: its own files, put into /var/log/reeld/ranks. `drop_in`: whether
    journald has our configuration."""
    folder.mkdir()
    log = folder / "log"
    ranks = log / "reeld/ranks"
    ranks.mkdir(parents=True)
    for file in files:
        (ranks / file.name).write_bytes(file.read_bytes())
    feed = folder / "feed"
    feed.write_text("".join(f"{line}\n" for line in journal))
    command = {"rsyslog": _rsyslog, "syslog-ng": _syslog_ng}[logger](folder)
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=private"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*own, "sh", "-c", _SCRIPT, "sh", str(log), str(feed), *command],
            env={**tool_environment(), "DROP_IN": str(LOGS / "journald-reeld.conf") if drop_in else ""},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield Pipeline(folder, process)
        finally:
            process.communicate(b"\n", timeout=30)


def run_pipeline(
    logger: str,
    folder: Path,
    *,
    journal: Sequence[str] = (),
    files: Sequence[Path] = (),
    expected: int,
    drop_in: bool = True,
) -> dict[str, list[str]]:
    """The lines of each file that the logger has written, once there are `expected` of them or the time is up."""
    with pipeline(logger, folder, journal=journal, files=files, drop_in=drop_in) as running:
        return running.wait_lines(expected)
