"""Every memory strategy gives the frames of the plain one, with LoRAs too; N ranks read the files once together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed.experts import write_loras, write_two_experts
from tests.distributed.launch import run_module

STRATEGIES = {1: ["resident", "encoder_offload", "vram_limit"], 2: ["resident", "encoder_offload", "fsdp"]}


@pytest.fixture(scope="module")
def case(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("strategies")
    profile = write_two_experts(models, folder)
    write_loras(folder / "files")
    return {
        "profile": str(profile),
        "folder": str(folder / "two-experts"),
        "lora": str(folder / "files" / "peft.safetensors"),
        "arguments": {
            "prompt": "a red fox runs through snow",
            "negative_prompt": "blurry",
            "seed": 11,
            "height": 64,
            "width": 64,
            "num_frames": 5,
            "num_inference_steps": 3,
            "sigma_shift": 5.0,
        },
    }


@pytest.fixture(scope="module", params=[1, 2])
def run(request: pytest.FixtureRequest, case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ranks, frames by strategy and case, what each rank told of each strategy)."""
    ranks, folder = request.param, tmp_path_factory.mktemp("run")
    (folder / "case.json").write_text(json.dumps({**case, "strategies": STRATEGIES[ranks]}))
    run_module("strategies", folder / "case.json", folder / "frames", ranks=ranks)
    return ranks, load_file(folder / "frames"), json.loads((folder / "frames.json").read_text())


def test_every_strategy_gives_the_same_frames(run: Any) -> None:
    """Where weights wait, or how they are spread, changes no frame; LoRAs come and go, and leave the weights' bits."""
    ranks, frames, told = run
    assert np.abs(frames["resident lora"] - frames["resident plain"]).max() > 1e-2, "the LoRA changes nothing"
    for strategy in STRATEGIES[ranks]:
        for name in ("plain", "lora", "again"):
            expected = frames[f"resident {name.replace('again', 'plain')}"]
            assert np.abs(frames[f"{strategy} {name}"] - expected).max() <= 1e-5, f"{strategy} {name}"
        assert all(rank[strategy]["same_bits"] for rank in told), strategy


def test_the_ranks_read_every_byte_once_together(run: Any, case: dict[str, Any]) -> None:
    """All ranks together read the files' size once, and headers beside it; each says how far it is, in bytes."""
    ranks, _, told = run
    size = sum(path.stat().st_size for path in Path(case["folder"]).rglob("*.safetensors"))
    for strategy in STRATEGIES[ranks]:
        read = [rank[strategy]["read"] for rank in told]
        # Headers are read on every rank, and Python's own files now and then.
        assert size * 0.97 <= sum(read) <= size * 1.25, (strategy, size, read)
        assert max(read) < 1.3 * size / ranks or ranks == 1, (strategy, size, read)
        for rank in told:
            done, total = rank[strategy]["progress"]
            assert done == total
            assert rank[strategy]["rising"]
        assert told[0][strategy]["progress"][1] == pytest.approx(size, rel=0.03)


def test_sharded_weights_are_shared_out(run: Any) -> None:
    """With `fsdp` a rank holds half of the blocks, which are most of the weights."""
    ranks, _, told = run
    if ranks == 1:
        pytest.skip("one rank has nobody to share with")
    for rank in told:
        assert rank["fsdp"]["weights"] < 0.72 * rank["resident"]["weights"]
