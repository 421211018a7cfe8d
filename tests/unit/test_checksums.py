"""SHA256SUMS: every file is checked by one rank, and a changed byte is found and named."""

import hashlib
from pathlib import Path

import pytest

from parallel.checksums import verify_checksums
from parallel.profile import ModelFiles, ModelFolderError, load_profile


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    paths = {"dit": (tmp_path / "a" / "1.safetensors", tmp_path / "a" / "2.safetensors"), "vae": (tmp_path / "vae",)}
    (tmp_path / "a").mkdir()
    lines = []
    for index, path in enumerate(path for part in paths.values() for path in part):
        path.write_bytes(b"weights" * (index + 1))
        mark = "*" if index else " "
        lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()} {mark}./{path.relative_to(tmp_path)}")
    (tmp_path / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return ModelFiles(profile=load_profile("tiny-t2v"), folder=tmp_path, paths=paths, tokenizer=tmp_path)


def test_the_ranks_read_every_file_once_together(files: ModelFiles) -> None:
    """Two ranks share the files; together they read each once."""
    read: list[str] = []
    for rank in range(2):
        verify_checksums(files, rank=rank, world_size=2, on_file=lambda path: read.append(path.name))
    assert sorted(read) == ["1.safetensors", "2.safetensors", "vae"]


def test_a_changed_file_is_named(files: ModelFiles) -> None:
    """One other byte, of the same length, is found."""
    path = files.paths["dit"][1]
    path.write_bytes(b"Weights" * 2)
    with pytest.raises(ModelFolderError, match=r"a/2\.safetensors: its SHA-256 is"):
        verify_checksums(files, rank=0, world_size=1)


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "No such file"), ("", "does not list a/1.safetensors"), ("x\n", "line 1")]
)
def test_a_list_that_does_not_serve_is_an_error(files: ModelFiles, text: str | None, reason: str) -> None:
    """Without a list, or with one that lacks a file, nothing is taken as checked."""
    path = files.folder / "SHA256SUMS"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ModelFolderError, match=reason):
        verify_checksums(files, rank=0, world_size=1)
