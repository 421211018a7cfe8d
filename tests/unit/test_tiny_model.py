"""The tiny models are the same bytes each time, load as real ones do, and paint what the job says."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffsynth.configs import MODEL_CONFIGS
from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer
from diffsynth.pipelines.wan_video import ModelConfig, WanVideoPipeline
from PIL import Image
from safetensors import safe_open

from parallel.profile import check_model_folder, load_profile
from parallel.tiny import DEMO_MODELS, TINY_MODELS, write_tiny_model
from parallel.tiny_registry import TEXT_ENCODER_SHAPE, TINY_MODEL_CONFIGS, register_tiny_models

NAMES = tuple(TINY_MODELS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    assert write_tiny_model(folder) == [folder / name for name in NAMES]
    register_tiny_models()
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_files_are_the_same_bytes_each_time(models: Path, tmp_path: Path) -> None:
    """Two writes give the same files, and a write over existing files as well."""
    write_tiny_model(tmp_path)
    first = digests(tmp_path)
    write_tiny_model(tmp_path)
    assert first == digests(tmp_path) == digests(models)
    assert len([name for name in first if name.startswith("tiny-t2v/")]) == 5
    assert len([name for name in first if name.startswith("tiny-i2v/")]) == 8


def test_every_folder_fits_its_profile_and_stays_small(models: Path) -> None:
    """Each folder passes the check that a real one must pass, may be read by everyone, and is small."""
    for name in NAMES:
        files = check_model_folder(load_profile(name), models / name)
        paths = [path for role in files.paths.values() for path in role]
        assert sum(path.stat().st_size for path in paths) < 70_000_000
        assert all(path.stat().st_mode & 0o444 == 0o444 for path in paths)
    assert len(check_model_folder(load_profile("tiny-i2v"), models / "tiny-i2v").paths["dit"]) == 3


def test_the_registered_hashes_are_those_of_the_profiles(models: Path) -> None:
    """DiffSynth's registry and the profiles name the same checkpoints, and registering twice adds nothing."""
    in_profiles = {part.model_hash for name in NAMES for part in load_profile(name).parts}
    assert in_profiles == {config["model_hash"] for config in TINY_MODEL_CONFIGS}
    before = len(MODEL_CONFIGS)
    register_tiny_models()
    assert len(MODEL_CONFIGS) == before


def test_the_clip_file_has_the_textual_half_that_diffsynth_drops(models: Path) -> None:
    """The published CLIP file holds both halves; so does the tiny one."""
    path = models / "tiny-i2v" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert {"log_scale", "visual.head", "textual.blocks.1.attn.q.bias", "textual.head.2.weight"} <= names


@pytest.mark.parametrize(
    "prompt",
    [
        "a red fox runs through snow",
        "",
        "Ein Füchslein rennt",
        "色调艳丽 过曝 🦊",
        "tab\tand\nline   spaces",
    ],
)
def test_the_tokenizer_keeps_every_text_within_the_vocabulary(models: Path, prompt: str) -> None:
    """DiffSynth's own wrapper gets 512 ids below the encoder's vocabulary, closed by `</s>` and padded."""
    tokenizer = HuggingfaceTokenizer(str(models / "tiny-t2v" / "google" / "umt5-xxl"), seq_len=512, clean="whitespace")
    ids, mask = tokenizer(prompt, return_mask=True, add_special_tokens=True)
    assert ids.shape == mask.shape == (1, 512)
    assert ids.min() >= 0
    assert ids.max() < TEXT_ENCODER_SHAPE["vocab"]
    length = int(mask.sum())
    assert ids[0, length - 1] == 1
    assert (ids[0, length:] == 0).all()


def test_words_are_told_apart_by_the_tokenizer(models: Path) -> None:
    """Known words are one piece each and the text can be read back."""
    tokenizer = HuggingfaceTokenizer(str(models / "tiny-t2v" / "google" / "umt5-xxl"), seq_len=512, clean="whitespace")
    ids, mask = tokenizer("a red fox runs through snow", return_mask=True)
    assert int(mask.sum()) == 7
    assert tokenizer.tokenizer.decode(ids[0, :6]) == "a red fox runs through snow"


def load_pipeline(models: Path, name: str) -> WanVideoPipeline:
    files = check_model_folder(load_profile(name), models / name)
    configs = [
        ModelConfig(path=[str(path) for path in paths] if len(paths) > 1 else str(paths[0]))
        for paths in files.paths.values()
    ]
    tokenizer = ModelConfig(path=str(files.tokenizer))
    return WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", model_configs=configs, tokenizer_config=tokenizer
    )


def generate(pipeline: WanVideoPipeline, *, prompt: str, seed: int, image: Image.Image | None = None) -> torch.Tensor:
    """Frames as [channels, frames, height, width], float32 in -1..1."""
    video = pipeline(
        prompt=prompt,
        negative_prompt="blurry",
        input_image=image,
        seed=seed,
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=2,
        output_type="floatpoint",
    )
    assert isinstance(video, torch.Tensor)
    return video[0]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_diffsynths_pipeline_generates_from_the_folder(models: Path, name: str) -> None:
    """Real loader, real pipeline: finite frames that vary and follow seed, prompt and image."""
    pipeline = load_pipeline(models, name)
    assert (pipeline.image_encoder is not None) == (name == "tiny-i2v")
    image = other = None
    if name == "tiny-i2v":
        image = Image.linear_gradient("L").convert("RGB")
        other = Image.radial_gradient("L").convert("RGB")
    frames = generate(pipeline, prompt="a red fox", seed=7, image=image)
    assert frames.shape == (3, 9, 64, 96)
    assert torch.isfinite(frames).all()
    assert all(0.05 < frame.std() < 0.8 for frame in frames.unbind(1))
    assert frames.diff(dim=1).abs().mean(dim=(0, 2, 3)).min() > 0.05
    assert (frames.abs() > 0.99).float().mean() < 0.05
    assert torch.equal(frames, generate(pipeline, prompt="a red fox", seed=7, image=image))
    # Below the 50 dB that comparisons of frames ask for: a mixed-up seed, prompt or image cannot pass one.
    assert psnr(frames, generate(pipeline, prompt="a red fox", seed=8, image=image)) < 40
    assert psnr(frames, generate(pipeline, prompt="a blue boat at night", seed=7, image=image)) < 40
    if other is not None:
        assert psnr(frames, generate(pipeline, prompt="a red fox", seed=7, image=other)) < 40
