"""Profiles name real checkpoints, and a folder that is not what its profile says is refused in one line."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffsynth.configs import MODEL_CONFIGS
from diffsynth.core.loader.file import hash_model_file
from diffsynth.models.model_loader import ModelPool
from safetensors import safe_open

from parallel.layouts import hash_layout, read_layout
from parallel.profile import (
    ModelFolderError,
    ModelPart,
    ModelProfile,
    builtin_profile_names,
    check_model_folder,
    load_profile,
)
from parallel.tiny import TINY_MODELS
from tests.unit.layouts import published_layout, registry_entry, write_sparse, write_sparse_folder

# Each published model with the shards of its DiTs.
SHARDS = {
    "wan2.1-flf2v-14b-720p": [7],
    "wan2.1-fun-1.3b-control": [1],
    "wan2.1-fun-1.3b-inp": [1],
    "wan2.1-fun-14b-control": [1],
    "wan2.1-fun-14b-inp": [1],
    "wan2.1-fun-v1.1-1.3b-control": [1],
    "wan2.1-fun-v1.1-1.3b-control-camera": [1],
    "wan2.1-fun-v1.1-14b-control": [1],
    "wan2.1-fun-v1.1-14b-control-camera": [1],
    "wan2.1-i2v-14b-480p": [7],
    "wan2.1-i2v-14b-720p": [7],
    "wan2.1-t2v-1.3b": [1],
    "wan2.1-t2v-1.3b-speedcontrol": [1],
    "wan2.1-t2v-14b": [6],
    "wan2.1-vace-1.3b": [1],
    "wan2.1-vace-14b": [7],
    "wan2.2-fun-a14b-control": [1, 1],
    "wan2.2-fun-a14b-control-camera": [1, 1],
    "wan2.2-fun-a14b-inp": [1, 1],
    "wan2.2-i2v-a14b": [6, 6],
    "wan2.2-s2v-14b": [4],
    "wan2.2-t2v-a14b": [6, 6],
    "wan2.2-ti2v-5b": [3],
    "wan2.2-vace-fun-a14b": [1, 1],
}
REAL_PROFILES = list(SHARDS)


def refusal(profile: ModelProfile, folder: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        check_model_folder(profile, folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_built_in_profiles_are_the_tiny_and_the_published_models() -> None:
    """Every profile that the documentation names can be loaded by its name."""
    assert builtin_profile_names() == sorted([*REAL_PROFILES, *TINY_MODELS])
    for name in builtin_profile_names():
        assert load_profile(name).name == name


def test_reading_profiles_needs_no_torch() -> None:
    """The launcher and the command line check a model folder without waiting seconds for torch."""
    script = "import sys, parallel.profile as p; p.load_profile('tiny-t2v'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def mappable(part: ModelPart, folder: Path, spare: Path) -> list[Path]:
    """The part's files; where one is larger than a small machine may map, the same tensors in eight."""
    paths = [folder / file for file in part.files]
    if max(path.stat().st_size for path in paths) < 20e9:
        return paths
    layout = list(published_layout(part).items())
    for index in range(8):
        write_sparse(spare / f"{index}.safetensors", dict(layout[index::8]))
    return sorted(spare.iterdir())


@pytest.mark.parametrize("name", REAL_PROFILES)
def test_a_real_profile_is_the_checkpoint_that_diffsynth_knows(name: str, tmp_path: Path) -> None:
    """The published layout hashes to DiffSynth's registered value, over all its shards."""
    profile = load_profile(name)
    folder = write_sparse_folder(profile, tmp_path / name)
    for part in profile.parts:
        paths = [str(path) for path in mappable(part, folder, tmp_path / part.role)]
        assert hash_model_file(paths if len(paths) > 1 else paths[0]) == part.model_hash
        assert hash_layout(published_layout(part)) == part.model_hash == registry_entry(part)["model_hash"]
    files = check_model_folder(profile, folder)
    assert list(files.paths) == [part.role for part in profile.parts]
    assert all(path.is_file() for paths in files.paths.values() for path in paths)
    assert files.tokenizer.is_dir()
    assert [len(files.paths[role]) for role in files.paths if role.startswith("dit")] == SHARDS[name]
    # Nothing but headers is on disk.
    assert sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) < 20_000_000


def tasks_of(profile: ModelProfile, dit: dict[str, Any]) -> set[str]:
    """What a DiT can do, by DiffSynth's description of it."""
    hashes = {part.model_hash for part in profile.parts}
    if any(entry["model_name"] == "wan_video_vace" and entry["model_hash"] in hashes for entry in MODEL_CONFIGS):
        return {"vace"}
    if "audio_dim" in dit:
        return {"speech_to_video"}
    if dit.get("add_control_adapter"):
        return {"camera_to_video"}
    if dit.get("has_image_pos_emb"):
        return {"first_last_frame_to_video"}
    if dit.get("fuse_vae_embedding_in_latents"):
        return {"text_to_video", "image_to_video", "video_to_video"}
    match dit["in_dim"]:
        case 16:
            return {"text_to_video", "video_to_video"}
        case 36:  # the first Wan2.1 I2V models were not taught a last frame
            plain = "i2v-14b" in profile.name
            return {"image_to_video"} if plain else {"image_to_video", "first_last_frame_to_video"}
        case 48 | 52:
            return {"control_to_video"}
    raise AssertionError(f"a DiT of another kind: {dit}")


@pytest.mark.parametrize("name", REAL_PROFILES)
def test_a_profile_agrees_with_the_model_it_names(name: str) -> None:
    """Heads, size multiples and tasks follow from DiffSynth's own description of the model."""
    profile = load_profile(name)
    dits = [registry_entry(part)["extra_kwargs"] for part in profile.parts if part.role.startswith("dit")]
    assert {dit["num_heads"] for dit in dits} == {profile.num_heads}
    vae = next(registry_entry(part)["model_class"] for part in profile.parts if part.role == "vae")
    multiple = {"WanVideoVAE": 16, "WanVideoVAE38": 32}[vae.rpartition(".")[2]]
    assert (profile.height_multiple, profile.width_multiple) == (multiple, multiple)
    assert set(profile.tasks) == tasks_of(profile, dits[0])
    optional = {"reference_image"} if dits[0].get("has_ref_conv") else set()
    if "control_to_video" in profile.tasks and dits[0]["has_image_input"]:
        optional |= {"input_image"}  # DiffSynth takes it only where CLIP is
    if "speech_to_video" in profile.tasks:
        optional |= {"s2v_pose_video"}
    assert set(profile.optional_inputs) == optional
    takes_clip = dits[0].get("has_image_input", False)
    assert ("image_encoder" in [part.role for part in profile.parts]) == takes_clip
    assert (profile.switch_boundary is not None) == (len(dits) == 2)


def test_the_1_3b_layout_loads_through_diffsynths_loader(tmp_path: Path) -> None:
    """DiffSynth takes the sparse file for the 1.3B checkpoint and fills every parameter from it."""
    profile = load_profile("wan2.1-t2v-1.3b")
    (part,) = [part for part in profile.parts if part.role == "dit"]
    layout = published_layout(part)
    path = tmp_path / part.files[0]
    write_sparse(path, layout)
    pool = ModelPool()
    pool.auto_load_model(str(path))
    model = pool.fetch_model("wan_video_dit")
    parameters = dict(model.named_parameters())
    assert sum(tensor.numel() for tensor in parameters.values()) == 1_418_996_800
    assert {name: tuple(tensor.shape) for name, tensor in parameters.items()} == layout
    assert all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in parameters.values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_folder(load_profile("wan2.2-ti2v-5b"), tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A 5B folder of its own for each test: three shards, an encoder and a VAE, all sparse."""
    target = tmp_path / "model"
    for path in sorted(whole.rglob("*")):
        copy = target / path.relative_to(whole)
        if path.is_dir():
            copy.mkdir(parents=True)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                # The header is within the first MiB; the rest is a hole and stays one.
                copy.write_bytes(file.read(1 << 20))
            os.truncate(copy, path.stat().st_size)
    return target


SECOND = "diffusion_pytorch_model-00002-of-00003.safetensors"
VAE = "Wan2.2_VAE.safetensors"


def remove_shard(folder: Path) -> str:
    (folder / SECOND).unlink()
    return SECOND


def truncate_shard(folder: Path) -> str:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    return SECOND


def truncate_header(folder: Path) -> str:
    os.truncate(folder / VAE, 1000)
    return VAE


def empty_file(folder: Path) -> str:
    os.truncate(folder / VAE, 0)
    return VAE


def append_bytes(folder: Path) -> str:
    os.truncate(folder / VAE, (folder / VAE).stat().st_size + 8)
    return VAE


def write_pickle(folder: Path) -> str:
    torch.save({"weight": torch.zeros(3)}, folder / VAE)
    return VAE


def write_html(folder: Path) -> str:
    """What a failed download often leaves."""
    (folder / VAE).write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    return VAE


def write_git_lfs_pointer(folder: Path) -> str:
    (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9952163512\n")
    return SECOND


def write_foreign_header(folder: Path) -> str:
    raw = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (folder / VAE).write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 4)
    return VAE


def write_overlapping_tensors(folder: Path) -> str:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    raw = json.dumps({"a": entry, "b": entry}).encode()
    (folder / VAE).write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 4)
    return VAE


def write_deep_header(folder: Path) -> str:
    raw = b"[" * 100_000
    (folder / VAE).write_bytes(len(raw).to_bytes(8, "little") + raw)
    return VAE


def put_another_vae(folder: Path) -> str:
    (part,) = [part for part in load_profile("wan2.1-t2v-14b").parts if part.role == "vae"]
    write_sparse(folder / VAE, published_layout(part))
    return VAE


def drop_a_tensor(folder: Path) -> str:
    layout = read_layout(folder / VAE)
    layout.popitem()
    write_sparse(folder / VAE, layout)
    return VAE


def repeat_a_shard(folder: Path) -> str:
    third = "diffusion_pytorch_model-00003-of-00003.safetensors"
    (folder / third).unlink()
    (folder / third).symlink_to(folder / SECOND)
    return third


def make_it_a_folder(folder: Path) -> str:
    (folder / VAE).unlink()
    (folder / VAE).mkdir()
    return VAE


def remove_tokenizer(folder: Path) -> str:
    shutil.rmtree(folder / "google")
    return "google/umt5-xxl/tokenizer"


def cut_tokenizer(folder: Path) -> str:
    (folder / "google/umt5-xxl/tokenizer.json").write_text('{"version": "1.')
    return "google/umt5-xxl/tokenizer.json"


def test_an_untouched_folder_is_accepted(folder: Path) -> None:
    """The folder that the faults below are put into has none of its own."""
    check_model_folder(load_profile("wan2.2-ti2v-5b"), folder)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (remove_shard, "missing; get it from Wan-AI/Wan2.2-TI2V-5B"),
        (truncate_shard, "truncated"),
        (truncate_header, "truncated"),
        (empty_file, "not a safetensors file"),
        (append_bytes, "too long"),
        (write_pickle, "not a safetensors file"),
        (write_html, "not a safetensors file"),
        (write_git_lfs_pointer, "not a safetensors file"),
        (write_foreign_header, "not a safetensors file"),
        (write_overlapping_tensors, "not a safetensors file"),
        (write_deep_header, "not a safetensors file"),
        (put_another_vae, "the tensors are the vae of wan2.1-"),
        (drop_a_tensor, "of no known model"),
        (repeat_a_shard, "00002-of-00003.safetensors has too"),
        (make_it_a_folder, "missing"),
        (remove_tokenizer, "missing; copy the tokenizer's folder"),
        (cut_tokenizer, "not JSON or truncated"),
    ],
)
def test_a_faulty_folder_is_refused_by_the_files_name(folder: Path, break_it: Callable[[Path], str], says: str) -> None:
    """One fault in one file: one line that begins with the file and says what is wrong with it."""
    name = break_it(folder)
    message = refusal(load_profile("wan2.2-ti2v-5b"), folder)
    assert message.startswith(f"{folder}/{name}")
    assert says in message


def test_the_published_pickle_in_place_of_the_safetensors_is_explained(folder: Path) -> None:
    """Who downloaded Wan-AI's own folder is told why the .pth is not used, and what to get."""
    (folder / VAE).rename(folder / "Wan2.2_VAE.pth")
    message = refusal(load_profile("wan2.2-ti2v-5b"), folder)
    assert "Wan2.2_VAE.pth is there, but reeld loads safetensors only" in message
    assert "get it from DiffSynth-Studio/Wan-Series-Converted-Safetensors" in message


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A mistyped path gives the path, not the first missing file in it."""
    assert refusal(load_profile("tiny-t2v"), tmp_path / "nowhere").startswith(f"{tmp_path}/nowhere: no such folder")


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root reads every file: for this test the process acts as a user who does not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that other users may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        subprocess.run(["chmod", "-R", "u+rwX", name], check=True)


@pytest.mark.parametrize("locked", ["model/" + VAE, "model/google", "model"])
def test_what_may_not_be_read_is_named(open_place: Path, locked: str, request: pytest.FixtureRequest) -> None:
    """A wrong owner after a copy as root, of a file or of a folder, is told as that."""
    folder = write_sparse_folder(load_profile("wan2.2-ti2v-5b"), open_place / "model")
    (open_place / locked).chmod(0)
    request.getfixturevalue("as_nobody")
    message = refusal(load_profile("wan2.2-ti2v-5b"), folder)
    assert message.startswith(f"{open_place}/{locked}")
    assert "cannot be read (Permission denied)" in message


def test_the_header_reader_agrees_with_safetensors(folder: Path) -> None:
    """Names and shapes read in pure Python are those of the safetensors library."""
    with safe_open(folder / VAE, framework="pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
    assert read_layout(folder / VAE) == expected
    assert sum(map(math.prod, expected.values())) > 500_000_000


PROFILE = """
name = "mine"
title = "Mine"
tasks = ["text_to_video"]
tokenizer = "google/umt5-xxl"
num_heads = 12
height_multiple = 16
width_multiple = 16
[defaults]
height = 64
width = 96
num_frames = 9
num_inference_steps = 4
cfg_scale = 5
sigma_shift = 5.0
fps = 8
[[parts]]
role = "dit"
files = ["dit.safetensors"]
model_hash = "d902a6ce26e2a99bef5452029d5a7781"
[[parts]]
role = "text_encoder"
files = ["t5.safetensors"]
model_hash = "d902a6ce26e2a99bef5452029d5a7781"
[[parts]]
role = "vae"
files = ["vae.safetensors"]
model_hash = "d902a6ce26e2a99bef5452029d5a7781"
"""


def test_a_users_own_profile_is_read_from_its_path(tmp_path: Path) -> None:
    """A .toml path works like a built-in name; a whole number serves where a fraction may stand."""
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE)
    profile = load_profile(str(path))
    assert (profile.name, profile.defaults.cfg_scale, profile.defaults.negative_prompt) == ("mine", 5.0, "")
    assert profile.switch_boundary is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "mine"\n', "", "name must be"),
        ('tasks = ["text_to_video"]', 'tasks = ["paint"]', "tasks has 'paint'"),
        ("num_heads = 12", "num_heads = true", "num_heads must be a whole number"),
        ("height = 64", "height = 65", "defaults: height must be a multiple of 16"),
        ("num_frames = 9", "num_frames = 10", "defaults: num_frames must be 4n+1"),
        ("cfg_scale = 5", "cfg_scale = nan", "defaults: cfg_scale must be a number"),
        ("fps = 8", "fps = 8\nframe_rate = 8", "defaults: frame_rate is not a known field"),
        ('role = "dit"', 'role = "unet"', "parts[0]: role is 'unet'"),
        ('role = "dit"', 'role = "dit_low_noise"', "parts needs one dit, or dit_high_noise followed by"),
        ('role = "vae"', 'role = "dit"', "parts has a role twice"),
        ('role = "vae"', 'role = "image_encoder"', "parts lacks the role vae"),
        ('"dit.safetensors"', '"../dit.safetensors"', "parts[0]: files has '../dit.safetensors'"),
        ('"dit.safetensors"', '"dit.pth"', "reeld loads safetensors only"),
        ('tokenizer = "google', 'tokenizer = "/google', "tokenizer has '/google/umt5-xxl'"),
        ('model_hash = "d902', 'model_hash = "D9', "parts[0]: model_hash must be 32"),
        ('title = "Mine"', 'title = "Mine"\nswitch_boundary = 0.9', "switch_boundary must be given with two"),
        ("[defaults]", "[defaults", "not a TOML file"),
    ],
)
def test_a_faulty_profile_is_refused_by_the_fields_name(tmp_path: Path, old: str, new: str, says: str) -> None:
    """One fault in a profile: one line with the file and the field."""
    assert old in PROFILE
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"), [("wan2.1", "give one of tiny-flf2v,"), ("/nowhere/x.toml", "No such file or directory")]
)
def test_an_unknown_profile_is_refused_with_the_known_ones(name: str, says: str) -> None:
    """A mistyped name is answered by the list to choose from."""
    with pytest.raises(ValueError, match=says):
        load_profile(name)
