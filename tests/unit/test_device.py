"""The device of a rank, where `device` leaves it to what is there."""

import os
import subprocess
import sys

_SCRIPT = """
import sys, structlog
from parallel.world import pick_device
with structlog.testing.capture_logs() as logs:
    assert pick_device(sys.argv[1], 0).type == "cpu"
print([(line["log_level"], line["event"]) for line in logs])
"""


def _said(device: str) -> str:
    """What choosing it logs in a process that sees no GPU."""
    command = [sys.executable, "-c", _SCRIPT, device]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_a_cpu_that_nobody_asked_for_is_said() -> None:
    """On a box whose driver is gone auto is the CPU: the log says it as a warning."""
    assert _said("auto") == "[('warning', 'no_gpu')]"
    assert _said("cpu") == "[]"
