"""What `reeld bench` says of a report, and of options it cannot use."""

from typing import Any

import pytest
from typer.testing import CliRunner

from ops.bench import markdown
from ops.cli import app
from ops.failure import UsageError

_ROW: dict[str, Any] = {"ranks": 1, "shape": [480, 832, 81], "tokens": 32760, "chosen": False, "repeats": [2.0]}
_RAN = {"seconds_per_step": 2.0, "seconds_per_video": 100.0, "tflops_per_card": 400.0, "fraction_of_matmul_peak": 0.5}
_REPORT: dict[str, Any] = {
    "profile": "wan", "weights": "random", "dtype": "bfloat16", "world_size": 2, "device": "a card", "torch": "2",
    "rounds": 1, "steps": 1, "matmul_tflops": {"best": 800.0, "kept_up": 700.0},
}  # fmt: skip


def test_a_variant_that_failed_says_why_in_its_row() -> None:
    """The others are compared with plain DiffSynth at the same shape; what never ran is not left out."""
    rows = [
        {**_ROW, **_RAN, "variant": "diffsynth"},
        {**_ROW, **_RAN, "variant": "ours 1 rank", "seconds_per_step": 1.6, "relative_error": 0.04},
        {**_ROW, "variant": "ours cfg2", "ranks": 2, "failed": "OutOfMemoryError: no"},
        {**_ROW, "variant": "ours ring2", "ranks": 2},
        {**_ROW, **_RAN, "variant": "ours 1 rank", "shape": [720, 1280, 81]},
    ]
    lines = markdown({**_REPORT, "results": rows}).splitlines()
    assert "| ours 1 rank | 1 | 1.600 | 100.0 | 1.25 | 400 | 50% |  | 4.0e-02 |" in lines
    assert any("| ours cfg2 | 2 | OutOfMemoryError: no |" in line for line in lines)
    assert any("| ours ring2 | 2 | not reached |" in line for line in lines)
    assert "| ours 1 rank | 1 | 2.000 | 100.0 |  | 400 | 50% |  |  |" in lines, "nothing to compare with at this shape"


@pytest.mark.parametrize("words", ["--shape 480x832", "--shape 0x8x9", "--dtype int8"])
def test_options_that_mean_nothing_are_refused(words: str) -> None:
    """Before any rank starts."""
    result = CliRunner().invoke(app, ["bench", "generate", *words.split()])
    assert isinstance(result.exception, UsageError)
