"""What rank 0 prepares reaches every rank, bit for bit, and is what plain DiffSynth gives its DiT."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_module


@pytest.fixture(scope="module")
def reports(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's report of one run on two ranks, by rank."""
    folder = tmp_path_factory.mktemp("conditions")
    run_module("conditions_ranks", models, folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


CASES = ("text", "text-bfloat16", "no-guidance", "image", "video")


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_the_same_bits(case: str, reports: list[dict[str, Any]]) -> None:
    """Tensors, flags and timesteps of a peer without text encoder, CLIP and VAE are rank 0's own."""
    assert reports[1][case] == reports[0][case]
    assert isinstance(reports[1][case]["shared.latents"], list)


@pytest.mark.parametrize("case", CASES)
def test_they_are_what_diffsynth_gives_its_dit(case: str, reports: list[dict[str, Any]]) -> None:
    """Every tensor of the model function's first call in plain DiffSynth, and no tensor more."""
    expected = reports[0][f"{case}-expected"]
    ours = reports[0][case]
    assert ours["timesteps"] == expected["timesteps"]
    for branch in ("positive", "negative") if case != "no-guidance" else ("positive",):
        of_call = {name.partition(".")[2]: value for name, value in expected.items() if name.startswith(branch)}
        given = {
            name.partition(".")[2]: value
            for name, value in ours.items()
            if name.startswith((f"{branch}.", "shared.")) and isinstance(value, list) and "torch" in str(value[0])
        }
        assert given == {name: of_call[name] for name in given}
        assert set(of_call) - set(given) <= {"noise", "timestep"}


def test_tensors_of_every_kind_are_broadcast(reports: list[dict[str, Any]]) -> None:
    """Large ones on their own, small ones of different dtypes together, empty ones and scalars too."""
    assert reports[1]["tensors"] == reports[0]["tensors"]
    assert len(set(map(str, reports[0]["tensors"]))) == 6


def test_shared_encoding_is_diffsynths(reports: list[dict[str, Any]]) -> None:
    """An image encoded by both ranks: whole frames up to rounding, tiles bit for bit."""
    assert [reports[1][name] for name in ("whole", "tiled")] == [reports[0][name] for name in ("whole", "tiled")]
    assert reports[0]["whole-scale"] > 0.1
    assert reports[0]["whole-error"] <= 1e-5
    assert reports[0]["tiled-error"] == 0.0


def test_a_known_text_is_not_encoded_again(reports: list[dict[str, Any]]) -> None:
    """Only new texts run the encoder, on rank 0; none runs for a negative prompt without guidance."""
    assert reports[0]["encoder_runs"] == [1, 3, 3, 4, 5]
    assert reports[1]["encoder_runs"] == [0] * 5


def test_a_failure_while_preparing_reaches_every_rank(reports: list[dict[str, Any]]) -> None:
    """The peers end with rank 0's own outcome instead of waiting for it; the next job is prepared as ever."""
    first, second = reports[0]["failures"], reports[1]["failures"]
    assert first == second
    assert [code for code, _ in first[:-1]] == ["internal"] * 3 + ["out_of_memory"]
    assert "not among the arguments of WanVideoPipeline.__call__: no" in first[2][1]


def test_a_splits_groups_wait_as_long_as_they_are_told(reports: list[dict[str, Any]]) -> None:
    """xfuser makes them with torch's own limit, which for NCCL is ten minutes: less than a step may take."""
    assert [report["timeout"] for report in reports] == [7 * 60] * 2
