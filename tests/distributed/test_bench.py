"""`reeld bench generate` as it is run: real ranks, a real folder, every variant."""

import json
import subprocess
import sys
from pathlib import Path


def test_bench_of_a_folder_on_two_ranks(models: Path, tmp_path: Path) -> None:
    """Plain DiffSynth, its USP and ours in every split, resident and sharded, over the folder's weights: all are
    timed, all latents are plain DiffSynth's, and a table and a plot are left."""
    reeld = Path(sys.executable).parent / "reeld"
    words = f"bench generate --profile tiny-t2v --model {models}/tiny-t2v --ranks 2 --shape 64x96x9 --dtype float32"
    words += f" --device cpu --no-compile --fsdp --steps 2 --rounds 2 --directory {tmp_path}/out"
    done = subprocess.run([reeld, *words.split()], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "generate.json").read_text())
    rows = {row["variant"]: row for row in report["results"]}
    splits = ["cfg2 ulysses1 ring1", "cfg1 ulysses2 ring1", "cfg1 ulysses1 ring2"]
    assert list(rows) == [
        "diffsynth", "diffsynth-usp", "ours 1 rank", *(f"ours {split}" for split in splits),
        *(f"ours fsdp {split}" for split in splits),
    ]  # fmt: skip
    for name, row in rows.items():
        assert "failed" not in row
        assert len(row["repeats"]) == 2
        assert name == "diffsynth" or row["relative_error"] < 1e-5, (name, row["relative_error"])
    table = (tmp_path / "out" / "generate.md").read_text()
    assert table in done.stdout
    assert all(f"{row['seconds_per_step']:.3f}" in table for row in rows.values())
    assert "<svg" in (tmp_path / "out" / "generate.svg").read_text()
