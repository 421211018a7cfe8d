"""The device of a rank, where `device` leaves it to what is there."""

import os
import subprocess
import sys

_SCRIPT = """
import sys, structlog
from parallel.device import pick_device
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


_FORKED = """
import os, sys, torch
from parallel.device import CudaForkedError, pick_device
torch.cuda.is_available()  # asks CUDA, as a library does that is imported before the fork
if os.fork() == 0:
    assert torch.cuda._is_in_bad_fork()
    try:
        pick_device("cuda", 0)
    except (ValueError, CudaForkedError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(0)
os.wait()
"""


def test_no_gpu_is_said_before_a_fork_is_blamed() -> None:
    """A rank that was forked where CUDA had been asked for finds no GPU either: that is the fault, and what to look
    at is named."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", _FORKED]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert said.startswith("ValueError: no GPU for local rank 0: 0 found, with CUDA_VISIBLE_DEVICES=''"), said
    assert "driver" in said
    assert "`reeld doctor --torch`" in said
