"""A model profile names the parts of a model; a model folder is a directory that has them.

Owns the TOML format of profiles, the built-in profiles, and the check of a folder against its profile: every
file there, whole, a safetensors file, and with the tensor names and shapes that the profile's hash stands
for. Only headers are read, so a 28 GB folder is checked in milliseconds and without torch. Leaves out loading
the weights (`parallel/` modules that import DiffSynth) and whether the numbers in the files are good ones.
"""

import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from parallel.layouts import Layout, LayoutError, hash_layout, read_layout
from parallel.tasks import TASKS

# Needed at every denoising step, so on every rank. VACE has no role of its own: it is in its DiT's checkpoint.
LOOP_ROLES = ("dit", "dit_high_noise", "dit_low_noise", "motion_controller")
# Needed before and after the denoising loop: rank 0 alone must have these.
END_ROLES = ("text_encoder", "vae", "image_encoder", "audio_encoder")
ROLES = LOOP_ROLES + END_ROLES
DIT_ROLES = (("dit",), ("dit_high_noise", "dit_low_noise"))


class ModelFolderError(Exception):
    """Raised when a model folder does not hold what its profile names; one line, to be shown as it is."""


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One model of the pipeline: a checkpoint of one or several safetensors files.

    `model_hash` is DiffSynth's `hash_model_file` over the files together. `source`: where to get them.
    """

    role: str
    files: tuple[str, ...]
    model_hash: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a job gets for the parameters it leaves out, in DiffSynth's spellings."""

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    cfg_scale: float
    sigma_shift: float
    fps: int
    negative_prompt: str


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """What a model is made of and what it can do.

    `parts` are in the order in which they are loaded: DiffSynth takes the first DiT for the high noise
    levels. `switch_boundary` is the fraction of the noise schedule below which the second expert takes over.
    `tea_cache_model_id` names the polynomial of DiffSynth's TeaCache, where there is one for this model.
    `optional_inputs` are those of its tasks' optional inputs that this model takes. `audio_processor` is the
    folder of the audio encoder's processor, where there is such an encoder.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    parts: tuple[ModelPart, ...]
    tokenizer: str
    num_heads: int
    height_multiple: int
    width_multiple: int
    defaults: GenerationDefaults
    switch_boundary: float | None = None
    tea_cache_model_id: str | None = None
    optional_inputs: tuple[str, ...] = ()
    audio_processor: str | None = None


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A folder that passed `check_model_folder`: absolute paths, by role, in the profile's order."""

    profile: ModelProfile
    folder: Path
    paths: dict[str, tuple[Path, ...]]
    tokenizer: Path
    audio_processor: Path | None = None


def builtin_profile_names() -> list[str]:
    """The names that `load_profile` knows without a file, sorted."""
    folder = resources.files("parallel") / "profiles"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_profile(name_or_path: str) -> ModelProfile:
    """Read a built-in profile by name, or a user's own from a path that ends in `.toml`.

    Raises `ValueError` with one line that names the profile and the field at fault.
    """
    names = builtin_profile_names()
    try:
        if name_or_path in names:
            text = (resources.files("parallel") / "profiles" / f"{name_or_path}.toml").read_text(encoding="utf-8")
        elif name_or_path.endswith(".toml"):
            text = Path(name_or_path).read_text(encoding="utf-8")
        else:
            known = ", ".join(names)
            raise ValueError(f"profile {name_or_path!r} is unknown: give one of {known}, or the path of a .toml file")
        return _profile(_Table(tomllib.loads(text), f"profile {name_or_path}"))
    except OSError as error:
        raise ValueError(f"profile {name_or_path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"profile {name_or_path}: not a TOML file: {error}") from error


def check_model_folder(profile: ModelProfile, folder: Path) -> ModelFiles:
    """Find every file of `profile` under `folder` and check it by its header.

    Raises `ModelFolderError` at the first file that is missing, truncated or of another model.
    """
    folder = folder.absolute()
    paths = {part.role: tuple(folder / name for name in part.files) for part in profile.parts}
    tokenizer = folder / profile.tokenizer
    processor = None if profile.audio_processor is None else folder / profile.audio_processor
    try:
        if not folder.is_dir():
            raise ModelFolderError(f"{folder}: no such folder; it should hold the files of the profile {profile.name}")
        for part in profile.parts:
            _check_present(part, paths[part.role])
        for part in profile.parts:
            _check_layout(profile, part, paths[part.role])
        _check_json_folder("tokenizer", tokenizer, ("tokenizer_config.json", "tokenizer.json"))
        if processor is not None:
            _check_json_folder("audio processor", processor, ("preprocessor_config.json", "vocab.json"))
    except OSError as error:
        raise ModelFolderError(
            f"{error.filename}: cannot be read ({error.strerror}); give reeld's user the right to read it"
        ) from error
    except LayoutError as error:
        raise ModelFolderError(str(error)) from error
    return ModelFiles(profile=profile, folder=folder, paths=paths, tokenizer=tokenizer, audio_processor=processor)


def _check_present(part: ModelPart, paths: tuple[Path, ...]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return
    first = missing[0]
    others = f" (and {len(missing) - 1} more of {len(paths)})" if len(missing) > 1 else ""
    origin = f"; get it from {part.source}" if part.source else ""
    # Wan-AI publishes encoders and VAE as pickles: who has only these must be told why they are not used.
    pickle = first.with_suffix(".pth")
    refused = f"; {pickle.name} is there, but reeld loads safetensors only" if pickle.exists() else ""
    raise ModelFolderError(f"{first}: missing{others}{refused}{origin}")


def _check_layout(profile: ModelProfile, part: ModelPart, paths: tuple[Path, ...]) -> None:
    layout: Layout = {}
    owner: dict[str, Path] = {}
    for path in paths:
        shard = read_layout(path)
        for name in shard:
            if name in owner:
                raise ModelFolderError(
                    f"{path}: holds {name}, which {owner[name].name} has too; download the shards again"
                )
            owner[name] = path
        layout |= shard
    found = hash_layout(layout)
    if found == part.model_hash:
        return
    shards = f" and its {len(paths) - 1} other shards" if len(paths) > 1 else ""
    known = next((name for name, hashed in _builtin_hashes() if hashed == found), "of no known model")
    origin = f"; get it from {part.source}" if part.source else ""
    raise ModelFolderError(
        f"{paths[0]}{shards}: not the {part.role} of {profile.name}: the tensors are {known}"
        f" (layout {found}, expected {part.model_hash}){origin}"
    )


def _builtin_hashes() -> Iterator[tuple[str, str]]:
    for name in builtin_profile_names():
        for part in load_profile(name).parts:
            yield f"the {part.role} of {name}", part.model_hash


def _check_json_folder(what: str, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelFolderError(f"{path}: missing; copy the {what}'s folder {folder.name} there")
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise ModelFolderError(f"{path}: not JSON or truncated; copy or download it again") from error


class _Table:
    """A TOML table that is taken apart key by key; an error names the field by its path."""

    def __init__(self, values: dict[str, object], where: str) -> None:
        self.values = dict(values)
        self.where = where

    def fault(self, key: str, wanted: str) -> ValueError:
        return ValueError(f"{self.where}: {key} {wanted}")

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self.values.pop(key, default)
        if not isinstance(value, str) or (default is None and not value):
            raise self.fault(key, "must be a text that is not empty")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values.pop(key, None)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise self.fault(key, "must be a list of texts that is not empty")
        if len(set(value)) != len(value):
            raise self.fault(key, "names something twice")
        return tuple(value)

    def whole(self, key: str) -> int:
        value = self.values.pop(key, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fault(key, "must be a whole number above 0")
        return value

    def number(self, key: str) -> float:
        value = self.values.pop(key, None)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise self.fault(key, "must be a number above 0")
        return float(value)

    def table(self, key: str) -> "_Table":
        value = self.values.pop(key, None)
        if not isinstance(value, dict):
            raise self.fault(key, "must be a table")
        return _Table(value, f"{self.where}: {key}")

    def tables(self, key: str) -> "list[_Table]":
        value = self.values.pop(key, None)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            raise self.fault(key, f"must be given as [[{key}]] tables")
        return [_Table(item, f"{self.where}: {key}[{index}]") for index, item in enumerate(value)]

    def end(self) -> None:
        if self.values:
            raise self.fault(next(iter(self.values)), "is not a known field")


def _profile(table: _Table) -> ModelProfile:
    tasks = table.texts("tasks")
    for task in tasks:
        if task not in TASKS:
            raise table.fault("tasks", f"has {task!r}: give some of {', '.join(TASKS)}")
    optional = table.texts("optional_inputs") if "optional_inputs" in table.values else ()
    for name in optional:
        if not any(name in TASKS[task].optional for task in tasks):
            raise table.fault("optional_inputs", f"has {name!r}: no optional input of the profile's tasks")
    parts = tuple(_part(item) for item in table.tables("parts"))
    _check_roles(table, parts)
    two_experts = any(part.role == "dit_low_noise" for part in parts)
    if ("switch_boundary" in table.values) != two_experts:
        raise table.fault("switch_boundary", "must be given with two experts, and with them only")
    boundary = table.number("switch_boundary") if two_experts else None
    if boundary is not None and boundary >= 1:
        raise table.fault("switch_boundary", "must be below 1")
    has_audio = any(part.role == "audio_encoder" for part in parts)
    if ("audio_processor" in table.values) != has_audio:
        raise table.fault("audio_processor", "must be given with an audio_encoder, and with it only")
    profile = ModelProfile(
        name=table.text("name"),
        title=table.text("title"),
        tasks=tasks,
        parts=parts,
        tokenizer=_inside(table, "tokenizer", table.text("tokenizer")),
        num_heads=table.whole("num_heads"),
        height_multiple=table.whole("height_multiple"),
        width_multiple=table.whole("width_multiple"),
        defaults=_defaults(table.table("defaults")),
        switch_boundary=boundary,
        tea_cache_model_id=table.text("tea_cache_model_id") if "tea_cache_model_id" in table.values else None,
        optional_inputs=optional,
        audio_processor=(_inside(table, "audio_processor", table.text("audio_processor")) if has_audio else None),
    )
    for side, multiple in (("height", profile.height_multiple), ("width", profile.width_multiple)):
        if getattr(profile.defaults, side) % multiple:
            raise table.fault(f"defaults: {side}", f"must be a multiple of {multiple}")
    table.end()
    return profile


def _check_roles(table: _Table, parts: tuple[ModelPart, ...]) -> None:
    roles = [part.role for part in parts]
    if len(set(roles)) != len(roles):
        raise table.fault("parts", "has a role twice")
    # The order matters: DiffSynth takes the DiT that is loaded first for the high noise levels.
    if tuple(role for role in roles if role.startswith("dit")) not in DIT_ROLES:
        raise table.fault("parts", "needs one dit, or dit_high_noise followed by dit_low_noise")
    for role in ("text_encoder", "vae"):
        if role not in roles:
            raise table.fault("parts", f"lacks the role {role}")


def _part(table: _Table) -> ModelPart:
    role = table.text("role")
    if role not in ROLES:
        raise table.fault("role", f"is {role!r}: give one of {', '.join(ROLES)}")
    files = tuple(_inside(table, "files", name) for name in table.texts("files"))
    for name in files:
        if not name.endswith(".safetensors"):
            raise table.fault("files", f"has {name!r}: reeld loads safetensors only")
    model_hash = table.text("model_hash")
    if len(model_hash) != 32 or set(model_hash) - set("0123456789abcdef"):
        raise table.fault("model_hash", "must be 32 hexadecimal digits")
    part = ModelPart(role=role, files=files, model_hash=model_hash, source=table.text("source", default=""))
    table.end()
    return part


def _defaults(table: _Table) -> GenerationDefaults:
    defaults = GenerationDefaults(
        height=table.whole("height"),
        width=table.whole("width"),
        num_frames=table.whole("num_frames"),
        num_inference_steps=table.whole("num_inference_steps"),
        cfg_scale=table.number("cfg_scale"),
        sigma_shift=table.number("sigma_shift"),
        fps=table.whole("fps"),
        negative_prompt=table.text("negative_prompt", default=""),
    )
    if defaults.num_frames % 4 != 1:
        # The VAE of every Wan model folds four frames into one, after a first frame of its own.
        raise table.fault("num_frames", "must be 4n+1")
    table.end()
    return defaults


def _inside(table: _Table, key: str, name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise table.fault(key, f"has {name!r}: give a path inside the model folder")
    return name
