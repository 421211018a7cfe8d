"""The denoising loop only ever queues: nothing in it waits for the device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_nothing_in_the_loop_waits_for_the_device(ranks: int, tmp_path: Path) -> None:
    """By torch's own watch, in every split and with sharded blocks; a step's numbers are read when they are there."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launch, "-m", "tests.gpu.waits_ranks", str(tmp_path / "told")],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(ranks):
        told = json.loads((tmp_path / f"told.{rank}").read_text())
        assert len(told.pop("a call that does")) == 1
        assert told, "no split was run"
        assert not any(told.values()), told
