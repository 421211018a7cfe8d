"""What `reeld plan` says, and what a daemon refuses, for real models that are not there."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon.admission import check_fits, predict_plan
from daemon.config import Config
from daemon.errors import PermanentJobError
from parallel.profile import check_model_folder, load_profile
from parallel.sizes import ModelSizes, read_sizes
from parallel.strategy import MemorySettings
from tests.plans import PLAN as SMALL
from tests.unit.layouts import write_sparse_folder

PLAN = replace(SMALL, model="14b", height=720, width=1280, num_frames=81, num_inference_steps=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 14B as published, without a byte of it on disk."""
    return write_sparse_folder(load_profile("wan2.1-t2v-14b"), tmp_path_factory.mktemp("14b"))


@pytest.fixture(scope="module")
def sizes(folder: Path) -> ModelSizes:
    return read_sizes(check_model_folder(load_profile("wan2.1-t2v-14b"), folder))


def reeld_plan(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "ops.cli", "plan", "--profile", "wan2.1-t2v-14b", "--model", str(folder), "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, json.loads(done.stdout) if done.stdout else {"error": done.stderr}


def test_sharding_halves_a_ranks_weights(folder: Path) -> None:
    """The 14B on one rank: 28.6 GB of DiT and 11.4 GB of encoder; with fsdp on two ranks each has half the DiT, and
    rank 0 two of the encoder's 24 blocks at a time: a card of two needs little more than half of what one needs."""
    shape = ("--height", "480", "--width", "832")
    status, one = reeld_plan(folder, *shape)
    assert status == 0
    weights = one["ranks"][0]["weights"]
    assert weights["dit"] == pytest.approx(28.58e9, rel=0.01)
    assert weights["text_encoder"] == pytest.approx(11.36e9, rel=0.01)
    status, two = reeld_plan(folder, "--ranks", "2", "--memory", "fsdp", *shape)
    assert status == 0
    assert [rank["weights"]["dit"] for rank in two["ranks"]] == [pytest.approx(weights["dit"] / 2, rel=0.03)] * 2
    assert "text_encoder" not in two["ranks"][0]["weights"] | two["ranks"][1]["weights"]
    streamed = two["ranks"][0]["phases"]["encode_text"]["streamed_blocks"]
    assert streamed == pytest.approx((weights["text_encoder"] - 256384 * 4096 * 2) * 2 / 24, rel=0.01)
    assert max(rank["total"] for rank in two["ranks"]) <= 0.55 * one["ranks"][0]["total"]
    assert two["largest_total"] <= 0.6 * one["largest_total"]


def test_what_does_not_fit_ends_with_1(folder: Path) -> None:
    """With the GPU's size the plan says whether it fits, and the exit status says it too."""
    assert [reeld_plan(folder, "--gpu-memory", size)[0] for size in ("80", "24")] == [0, 1]


def test_a_configuration_is_planned_as_the_daemon_would_run_it(folder: Path, tmp_path: Path) -> None:
    """The limit is the configuration's, and its other models' weights count. What nobody said is named, and can be
    chosen: one of its models, the ranks, the shape."""
    other = write_sparse_folder(load_profile("wan2.2-ti2v-5b"), tmp_path)
    config = tmp_path / "reeld.toml"
    config.write_text(
        f'memory_limit_gib = 80\n[[models]]\nprofile = "wan2.1-t2v-14b"\npath = "{folder}"\n'
        f'[[models]]\nprofile = "wan2.2-ti2v-5b"\npath = "{other}"\n'
    )

    def plan(*options: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "ops.cli", "plan", "--config", str(config), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stdout

    status, shown = plan("--json")
    both = json.loads(shown)
    assert (status, both["profile"], both["fits"], both["gpu_memory_gib"]) == (0, "wan2.1-t2v-14b", True, 80)
    assert both["assumed"] == {"profile": "wan2.1-t2v-14b", "ranks": 1, "height": 720, "width": 1280, "num_frames": 81}
    _, alone = reeld_plan(folder)
    assert both["ranks"][0]["weights"].pop("other_models") > 20e9
    assert both["ranks"][0]["weights"] == alone["ranks"][0]["weights"]

    status, shown = plan("--gpu-memory", "60", "--height", "480")
    assert status == 1
    assert "assumed: --profile wan2.1-t2v-14b --ranks 1 --width 1280 --num-frames 81 (" in shown
    assert shown.endswith("does not fit into 60 GiB\n")
    shape = ("--height", "704", "--width", "1280", "--num-frames", "121")
    status, shown = plan("--profile", "wan2.2-ti2v-5b", "--ranks", "2", *shape)
    assert shown.startswith("wan2.2-ti2v-5b: 1280x704, 121 frames")
    assert "assumed" not in shown
    config.write_text(config.read_text().removeprefix("memory_limit_gib = 80\n"))
    assert "no verdict: give --gpu-memory" in plan()[1]


def test_loras_take_host_memory_where_they_may_be_asked_for(folder: Path, tmp_path: Path) -> None:
    """Every rank keeps its part of the weights that they may change, and of LoRAs what `lora_cache_bytes` says."""
    config = tmp_path / "reeld.toml"
    config.write_text(
        f'lora_cache_bytes = 1000000\n[[models]]\nprofile = "wan2.1-t2v-14b"\npath = "{folder}"\n'
        f'[[loras]]\nname = "styles"\npath = "{tmp_path}"\n'
    )
    _, without = reeld_plan(folder, "--ranks", "2")
    _, with_loras = reeld_plan(folder, "--ranks", "2", "--config", str(config))
    for before, after in zip(without["ranks"], with_loras["ranks"], strict=True):
        added = {name: after["host"][name] for name in after["host"].keys() - before["host"].keys()}
        assert added == {"lora_cache": 1000000, "lora_originals": pytest.approx(28.5e9 / 2, rel=0.01)}
        assert after["total"] == before["total"]


def test_a_strategy_that_cannot_work_is_a_usage_error(folder: Path) -> None:
    """DiffSynth's VRAM management is for one rank; a strategy nobody knows is named with those that there are."""
    status, told = reeld_plan(folder, "--ranks", "2", "--memory", "vram_limit")
    assert (status, "for one rank" in told["error"]) == (2, True)
    with pytest.raises(ValueError, match="resident, encoder_offload, fsdp, vram_limit"):
        MemorySettings("turbo").check(world_size=1)
    with pytest.raises(ValueError, match="not for resident"):
        MemorySettings("resident", 8.0).check(world_size=1)


def test_a_job_that_cannot_fit_is_refused(sizes: ModelSizes) -> None:
    """`out_of_memory`, permanent, at `parameters`, with the figures; what fits is not refused."""
    config = Config(models=[{"profile": "wan2.1-t2v-14b", "path": "/models"}])
    check_fits(PLAN, {"14b": sizes}, config, capacity_bytes=80 * 10**9)
    with pytest.raises(
        PermanentJobError, match=r"1280x720 with 81 frames would need 4\d\.\d\d GiB on rank 0"
    ) as caught:
        check_fits(PLAN, {"14b": sizes}, config, capacity_bytes=48 * 10**9)
    assert (caught.value.code, caught.value.path, caught.value.retryable) == ("out_of_memory", "parameters", False)
    check_fits(replace(PLAN, height=480, width=832), {"14b": sizes}, config, capacity_bytes=48 * 10**9)
    with pytest.raises(PermanentJobError):
        check_fits(PLAN, {"14b": sizes, "other": sizes}, config, capacity_bytes=80 * 10**9)


@pytest.mark.parametrize("given", ["vace_video", "vace_video_mask", "vace_reference_image", "reference_image"])
def test_what_an_input_has_the_ranks_do_is_counted(given: str, sizes: ModelSizes) -> None:
    """Each of them is encoded by the VAE, and a reference image is denoised along, a latent frame more."""
    config = Config(models=[{"profile": "wan2.1-t2v-14b", "path": "/models"}])
    (without,) = predict_plan(PLAN, {"14b": sizes}, config)
    input_: dict[str, Any] = {given: "/staged"}
    (with_it,) = predict_plan(replace(PLAN, **input_), {"14b": sizes}, config)
    assert set(with_it.phases) - set(without.phases) == {"encode_frames"}
    units = with_it.phases["denoise"]["activations"] / without.phases["denoise"]["activations"]
    assert units == pytest.approx(22 / 21 if "reference" in given else 1)
