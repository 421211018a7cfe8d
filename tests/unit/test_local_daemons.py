"""Finding a box's daemons by what their processes hold open."""

import subprocess
import sys
from pathlib import Path

from daemon.logs import LAUNCHER_STACKS_FILE
from ops.local_daemons import find_daemon

# Holds a launcher's file open, and opens and closes others all the time.
_BUSY = """
import sys
held = open(sys.argv[1], "w")
print("ready", flush=True)
while True:
    files = [open("/dev/null") for _ in range(50)]
    for file in files:
        file.close()
"""


def test_a_launcher_that_opens_and_closes_files_is_found_every_time(tmp_path: Path) -> None:
    """A descriptor that is gone between two looks at it is not the end of the looking."""
    command = [sys.executable, "-c", _BUSY, str(tmp_path / LAUNCHER_STACKS_FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            for _ in range(300):
                found = find_daemon(process.pid)
                assert found is not None
                assert found.runtime.name == tmp_path.name
        finally:
            process.kill()
