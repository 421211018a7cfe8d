"""The memory model against what ranks really use, on a CPU, where every tensor can be counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.distributed.launch import run_module

SHAPE = {"height": 192, "width": 320, "num_frames": 9}
ULYSSES = {"cfg_degree": 1, "ulysses_degree": 2, "ring_degree": 1}
RING = {"cfg_degree": 1, "ulysses_degree": 1, "ring_degree": 2}


def _case(models: Path, name: str, model: str = "tiny-t2v", **changed: Any) -> dict[str, Any]:
    return {
        "name": name,
        "folder": str(models / model),
        "task": "text_to_video",
        "strategy": "resident",
        "dtype": "float32",
        "tiled": False,
        "shape": SHAPE,
        "pinned": {},
        **changed,
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_predictions_hold(ranks: int, models: Path, tmp_path: Path) -> None:
    """Each rank's fullest moment, in each phase that is not nothing, is within 10 % of what was predicted."""
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 384, 3), dtype=np.uint8)).save(image)
    direction = {"camera_control_direction": "Left", "camera_control_speed": 0.02}
    camera = {"task": "camera_to_video", "image": str(image), "shape": {**SHAPE, **direction}}
    vace = {"task": "vace", "shape": {**SHAPE, "vace_reference_image": str(image)}}
    cases = {
        1: [
            _case(models, "plain", shape={**SHAPE, "num_frames": 13}),
            _case(models, "image", "tiny-i2v", task="image_to_video", image=str(image), dtype="bfloat16"),
            _case(models, "tiled", tiled=True),
            _case(models, "vram_limit", strategy="vram_limit"),
            _case(models, "camera", "tiny-fun-camera", **camera),
        ],
        2: [
            _case(models, "cfg", dtype="bfloat16"),
            _case(models, "ulysses", pinned=ULYSSES),
            _case(models, "ring", pinned=RING),
            _case(models, "fsdp", pinned=ULYSSES, strategy="fsdp"),
            _case(models, "camera", "tiny-fun-camera", pinned=ULYSSES, **camera),
            _case(models, "VACE, fsdp", "tiny-vace", pinned=ULYSSES, strategy="fsdp", **vace),
        ],
    }[ranks]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_module("memory_ranks", tmp_path / "cases.json", tmp_path / "told.json", ranks=ranks)
    told = json.loads((tmp_path / "told.json").read_text())
    assert len(told) == ranks
    for rank, cases_told in enumerate(told):
        for name, each in cases_told.items():
            assert {"denoise", "decode"} <= each["predicted"].keys()
            for phase, predicted in each["predicted"].items():
                measured = each["measured"][phase]
                assert abs(predicted - measured) <= 0.1 * measured, (rank, name, phase, predicted, measured)
