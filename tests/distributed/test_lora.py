"""LoRAs against DiffSynth's own `load_lora`, on 1 and 2 ranks, and out of the weights again to the last bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed.experts import write_loras, write_two_experts
from tests.distributed.launch import run_module, run_reference


@pytest.fixture(scope="module")
def cases(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    profile = write_two_experts(models, folder)
    write_loras(folder / "files")

    def case(name: str, *loras: tuple[str, float, str], **arguments: Any) -> dict[str, Any]:
        return {
            "name": name,
            # 0.9: three of four steps would be the first expert's without it.
            "arguments": {"cfg_scale": 5.0, "switch_DiT_boundary": 0.9, **arguments},
            "loras": [
                {
                    "path": str(folder / "files" / f"{file}.safetensors"),
                    # DiffSynth does not know kohya's own names; the same numbers under names that it does.
                    "reference": str(folder / "files" / f"{file.replace('kohya', 'dotted')}.safetensors"),
                    "strength": strength,
                    "target": target,
                }
                for file, strength, target in loras
            ],
        }

    made = [
        case("none"),
        case("one", ("peft", 1.0, "both")),
        case("two", ("peft", 0.5, "both"), ("kohya", -0.8, "both")),
        case("high", ("kohya", 1.0, "high_noise")),
        case("low", ("peft", 1.0, "low_noise"), ("peft", 0.3, "high_noise")),
        case("distilled", ("dotted", 1.0, "both"), cfg_scale=1.0),
        case("none-again"),
    ]
    arguments = {
        "prompt": "a red fox runs through snow",
        "negative_prompt": "blurry",
        "seed": 11,
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 4,
        "sigma_shift": 5.0,
    }
    path = folder / "cases.json"
    document = {"profile": str(profile), "folder": str(folder / "two-experts"), "arguments": arguments, "cases": made}
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def reference(cases: Path) -> dict[str, Any]:
    output = cases.parent / "reference.safetensors"
    run_reference("reference_lora", cases, output)
    return load_file(output)


@pytest.mark.parametrize("ranks", [1, 2])
def test_loras_as_diffsynth_fuses_them_and_out_again(ranks: int, cases: Path, reference: dict[str, Any]) -> None:
    """Frames with LoRAs equal DiffSynth's to 1e-5 in float32; afterwards every weight has its own bits again.

    Holds for several LoRAs, for one expert, without guidance, in float32 and bfloat16, after a rank ran out of
    memory while it put or read them in, and for one of every layer; a rank then keeps as much as was predicted.
    """
    output = cases.parent / f"ours-{ranks}.safetensors"
    run_module("ours_lora", cases, output, ranks=ranks)
    ours = load_file(output)
    assert set(ours) == set(reference)
    for name, expected in reference.items():
        assert np.abs(ours[name] - expected).max() <= 1e-5, name
        if "none" not in name:
            assert np.abs(expected - reference["none"]).max() > 1e-2, f"{name} changes nothing"
    hashes = json.loads(Path(f"{output}.json").read_text())
    for name, each in hashes.items():
        assert len(set(each)) == 1, f"{name}: the ranks differ"
    for dtype in ("float32", "bfloat16"):
        original = hashes[f"{dtype} before"]
        for name in ("none", "none-again", "after", "failed", "unread", "every"):
            assert hashes[f"{dtype} {name}"] == original, f"{dtype} {name}"
        assert len({hashes[f"{dtype} {name}"][0] for name in ("none", "one", "two", "high", "low")}) == 5
    for dtype, shares in json.loads(Path(f"{output}.kept.json").read_text()).items():
        assert shares == [pytest.approx(1, rel=1e-3)] * ranks, dtype  # parts are padded to equal lengths
