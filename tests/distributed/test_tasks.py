"""Every task on 1 to 4 ranks against a direct call of DiffSynth's pipeline in a process of its own, in float32.

`make test` runs one case of each kind on 2 and 3 ranks; `make test-tasks` runs them all on 1, 2, 3 and 4.

The shapes are such that the tokens divide by neither 2, 4 nor, with VACE's reference image, 3. Each case takes one of
the splits that its ranks allow, and the cases take turns, so that every split is taken by some task.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from daemon.media import stage_audio, stage_video
from daemon.sections import InputsConfig
from tests.distributed.launch import run_module, run_reference

EVERYTHING = os.environ.get("REELD_EVERY_TASK") == "1"
SHAPE = {"height": 80, "width": 112, "num_frames": 9}  # 3 x 5 x 7 tokens
SHAPE_38 = {"height": 96, "width": 160, "num_frames": 9}  # 3 x 3 x 5 tokens: Wan2.2's VAE folds 16 x 16 pixels
# 4 latent frames, one of them the reference image: on 3 ranks a slice begins within a frame and ends in the next.
SHAPE_SPEECH = SHAPE | {"num_frames": 13}
FIRST, LAST, WHO = "first.png", "last.png", "who.png"
VIDEO, OTHER, SOUND = "video.mp4", "other.mp4", "sound.wav"

# By name: the model, the inputs, and what is not as usual.
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "two experts": ("tiny-t2v-a14b", {}, {}),
    "two experts, the first alone": ("tiny-t2v-a14b", {}, {"switch_DiT_boundary": 0.5}),
    "two experts, video to video": ("tiny-t2v-a14b", {"input_video": VIDEO}, {"denoising_strength": 0.9}),
    "two experts, first frame": ("tiny-i2v-a14b", {"input_image": FIRST}, {}),
    "two experts, first and last frame": ("tiny-i2v-a14b", {"input_image": FIRST, "end_image": LAST}, {}),
    "first and last frame": ("tiny-flf2v", {"input_image": FIRST, "end_image": LAST}, {}),
    "TI2V, text": ("tiny-ti2v", {}, SHAPE_38),
    "TI2V, image": ("tiny-ti2v", {"input_image": FIRST}, SHAPE_38),
    "video to video": ("tiny-t2v", {"input_video": VIDEO}, {"denoising_strength": 0.6}),
    "speed control": ("tiny-speedcontrol", {}, {"motion_bucket_id": 70}),
    "VACE, video": ("tiny-vace", {"vace_video": VIDEO}, {}),
    "VACE, reference": ("tiny-vace", {"vace_reference_image": WHO}, {}),
    "VACE, all": (
        "tiny-vace",
        {"vace_video": VIDEO, "vace_video_mask": OTHER, "vace_reference_image": WHO},
        {"vace_scale": 0.8},
    ),
    "control": ("tiny-fun-control", {"control_video": VIDEO}, {}),
    "control, reference": ("tiny-fun-control", {"control_video": VIDEO, "reference_image": WHO}, {}),
    "control, first frame": ("tiny-fun-control", {"control_video": VIDEO, "input_image": FIRST}, {"cfg_scale": 1.0}),
    "camera": (
        "tiny-fun-camera",
        {"input_image": FIRST},
        {"camera_control_direction": "LeftUp", "camera_control_speed": 0.02},
    ),
    "speech": ("tiny-s2v", {"input_image": FIRST, "input_audio": SOUND}, SHAPE_SPEECH),
    # The pose video is shorter: DiffSynth fills it up.
    "speech, pose": ("tiny-s2v", {"input_image": FIRST, "input_audio": SOUND, "s2v_pose_video": VIDEO}, SHAPE_SPEECH),
}

IN_SHORT = (
    "two experts, video to video",
    "two experts, first and last frame",
    "first and last frame",
    "TI2V, image",
    "VACE, reference",
    "VACE, all",
    "control, reference",
    "camera",
    "speech",
    "speech, pose",
)
# On 3 ranks each has 35 tokens, and torch's flash kernel for CPUs takes the last 3 through a product of their own that
# adds up the text's many equal padding tokens one after the other (seen on an AMD EPYC): ten times the rounding of the
# others. In float64 the frames are equal to 1.5e-7, the width of RoPE's float32 tables.
ROUNDED_MORE = {("first and last frame", 3): 3e-5}
if not EVERYTHING:
    CASES = {name: CASES[name] for name in IN_SHORT}


def write_files(folder: Path) -> None:
    """Three images, two videos of nine frames and a second of sound, as publishers would send them."""
    for seed, name in enumerate((FIRST, LAST, WHO)):
        pixels = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((180, 140)).save(folder / name)
    for source, name, length in (
        ("testsrc2=size=120x90:rate=8", VIDEO, ["-frames:v", "9", "-pix_fmt", "yuv420p"]),
        ("mandelbrot=size=120x90:rate=8", OTHER, ["-frames:v", "9", "-pix_fmt", "yuv420p"]),
        ("aevalsrc=0.3*sin(2*PI*(200+300*t)*t):duration=1.2", SOUND, []),
    ):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, *length]
        subprocess.run([*command, str(folder / name)], check=True)


def stage(file: Path, arguments: dict[str, Any]) -> Path:
    """The file as the daemon stages it."""
    config = InputsConfig(schemes=("file",), roots=(file.parent,))
    height, width = arguments["height"], arguments["width"]
    target = file.parent / f"{file.stem}-{width}x{height}x{arguments['num_frames']}.npy"
    if file.suffix == ".mp4" and not target.exists():
        size = {"width": width, "height": height, "num_frames": arguments["num_frames"]}
        stage_video(file.as_uri(), target, config, path="inputs", may_be_shorter=True, **size)
    elif file.suffix == ".wav":
        stage_audio(file.as_uri(), target, config, path="inputs")
    return target if target.exists() else file


@pytest.fixture(scope="module")
def cases(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_files(folder)
    usual = {"prompt": "a red fox runs through snow", "negative_prompt": "blurry", "seed": 11, **SHAPE}
    usual |= {"num_inference_steps": 2, "cfg_scale": 3.0, "sigma_shift": 5.0}
    made = []
    for number, (name, (model, inputs, changed)) in enumerate(CASES.items()):
        arguments = usual | changed
        staged = {argument: str(stage(folder / file, arguments)) for argument, file in inputs.items()}
        files = {
            argument: staged[argument] if file == SOUND else str(folder / file) for argument, file in inputs.items()
        }
        made.append(
            {
                "name": name,
                "model_folder": str(models / model),
                "dtype": "float32",
                "files": files,
                "staged": staged,
                "split": number,
                "arguments": arguments,
            }
        )
    path = folder / "cases.json"
    path.write_text(json.dumps(made))
    return path


@pytest.fixture(scope="module")
def reference(cases: Path) -> dict[str, Any]:
    output = cases.parent / "reference.safetensors"
    run_reference("reference", cases, output)
    return load_file(output)


def test_each_input_is_seen_in_the_frames(reference: dict[str, Any]) -> None:
    """What the comparisons would miss: a case whose inputs change nothing is no test of them."""
    for one, other in (
        ("two experts", "two experts, the first alone"),
        ("two experts, first frame", "two experts, first and last frame"),
        ("TI2V, text", "TI2V, image"),
        ("VACE, video", "VACE, all"),
        ("VACE, reference", "VACE, all"),
        ("control", "control, reference"),
        ("speech", "speech, pose"),
    ):
        if one in reference and other in reference:
            assert np.abs(reference[one] - reference[other]).mean() > 1e-3, (one, other)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4] if EVERYTHING else [2, 3])
def test_every_task_gives_diffsynths_frames(ranks: int, cases: Path, reference: dict[str, Any]) -> None:
    """To 1e-5, whatever the task, the number of ranks and the split; where torch rounds more, to that."""
    output = cases.parent / f"ours-{ranks}.safetensors"
    run_module("ours", cases, output, ranks=ranks)
    ours = load_file(output)
    assert {name.partition("|")[0] for name in ours} == set(CASES)
    for name, frames in ours.items():
        case = name.partition("|")[0]
        assert frames.shape == reference[case].shape, name
        assert np.abs(frames - reference[case]).max() <= ROUNDED_MORE.get((case, ranks), 1e-5), name
    splits = {name.partition("|")[2] for name in ours}
    assert len(splits) == {1: 1, 2: 3, 3: 2, 4: 5}[ranks], splits


# A transformer of each kind that has a forward of its own, and one with two experts.
OF_EACH_KIND = ("two experts, first and last frame", "VACE, all", "speech, pose", "camera")


@pytest.mark.parametrize(
    ("ranks", "memory", "compiled"),
    [
        (1, "vram_limit", ""),
        (2, "fsdp", ""),
        *([(1, "resident", "compile"), (2, "fsdp", "compile")] if EVERYTHING else []),
    ],
)
def test_tasks_under_memory_strategies_and_compiled(
    ranks: int, memory: str, compiled: str, cases: Path, reference: dict[str, Any]
) -> None:
    """The same frames to 1e-5 wherever the weights are, and from compiled blocks (1e-4: kernels of inductor's own)."""
    folder = cases.parent
    chosen = [case for case in json.loads(cases.read_text()) if case["name"] in OF_EACH_KIND]
    (folder / "chosen.json").write_text(json.dumps(chosen))
    output = folder / f"ours-{ranks}-{memory}{compiled}.safetensors"
    run_module("ours", folder / "chosen.json", output, memory, compiled, ranks=ranks)
    ours = load_file(output)
    assert {name.partition("|")[0] for name in ours} == set(OF_EACH_KIND)
    for name, frames in ours.items():
        difference = np.abs(frames - reference[name.partition("|")[0]]).max()
        assert difference <= (1e-4 if compiled else 1e-5), (name, difference)
