"""Sharded blocks as FSDP2 runs them, on real ranks."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_module


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_blocks_are_gathered_in_one_stream_and_never_stale(ranks: int, tmp_path: Path) -> None:
    """All blocks in one stream from the first pass on, because each stream has memory of its own that the allocator
    never gives to another; no record of a pass is kept after a job; and what a failed pass had gathered is not what
    runs after the weights have changed, nor keeps ranks from gathering the same blocks next."""
    run_module("sharding_ranks", tmp_path / "told.json", ranks=ranks)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told == {
        "calls": 24,
        "streams": 1,
        "records": 24,
        "records let go": 0,
        "equal": True,
        "at one place": True,
        "equal after a failure": True,
    }
