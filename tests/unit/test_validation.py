"""What is found out about a configuration before anything starts: every fault, on its line, with its field."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.config import Config
from daemon.errors import ConfigError
from daemon.validation import check

MODEL = {"profile": "tiny-t2v", "path": "/models/nope"}


def faults(folder: Path, **settings: object) -> list[str]:
    """What is wrong with a configuration whose one model is not there."""
    given = {"models": [MODEL], "output": {"directory": folder}, "work_directory": folder, **settings}
    with pytest.raises(ConfigError) as caught:
        check(Config.model_validate(given))
    return str(caught.value).splitlines()


def test_every_fault_is_told_at_once_with_its_field(tmp_path: Path) -> None:
    """Models, LoRAs, the URL's file, certificates and folders: none hides another."""
    (tmp_path / "file").touch()
    (tmp_path / "bad.safetensors").write_bytes(b"none")
    found = faults(
        tmp_path,
        models=[MODEL, {"profile": "bogus", "path": "/models/x"}, MODEL],
        loras=[{"name": "a", "path": "/loras/nope"}, {"name": "b", "path": tmp_path / "bad.safetensors"}],
        broker={"url_file": "/nope/url", "ca_file": "/nope/ca.pem"},
        output={"directory": tmp_path / "file" / "output"},
        work_directory=tmp_path / "file" / "work",
        log={"directory": tmp_path / "file" / "log"},
        inputs={"schemes": ["file"]},
    )
    starts = [
        "models.0.path: /models/nope: no such folder",
        "models.1.profile: profile 'bogus' is unknown",
        "models.2.profile: tiny-t2v and tiny-t2v both offer text_to_video",
        "models.2.path: /models/nope: no such folder",
        "loras.0.path: /loras/nope: no such file or directory",
        f"loras.1.path: {tmp_path}/bad.safetensors: ",
        "broker.url_file: /nope/url: No such file or directory",
        "broker.ca_file: /nope/ca.pem: No such file or directory",
        f"output.directory: {tmp_path}/file/output: not writable: Not a directory",
        f"work_directory: {tmp_path}/file/work: not writable: Not a directory",
        f"log.directory: {tmp_path}/file/log: not writable: Not a directory",
        "inputs.roots: ",
    ]
    assert len(found) == len(starts), found
    for line, start in zip(found, starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"vram_limit_gib": 20, "nproc_per_node": "auto"},
            "memory: vram_limit_gib is for the memory strategy vram_limit",
        ),
        ({"memory": "vram_limit", "nproc_per_node": 2}, "memory: memory strategy vram_limit is for one rank, not 2"),
        ({"parallel": {"ulysses_degree": 5}, "nproc_per_node": 2}, "parallel: cfg_degree any x ulysses_degree 5"),
        ({"parallel": {"cfg_degree": 2}, "device": "cpu"}, "parallel: cfg_degree 2 x"),
    ],
)
def test_what_no_rank_would_accept_is_a_fault_before_there_are_ranks(
    settings: dict[str, object], fault: str, tmp_path: Path
) -> None:
    """A memory strategy or a split that cannot work on so many ranks need not wait for a model's load."""
    found = faults(tmp_path, **settings)
    assert len(found) == 2, found
    assert any(line.startswith(fault) for line in found)


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "vram_limit", "vram_limit_gib": 20, "nproc_per_node": 1},
        {"parallel": {"ulysses_degree": 2}, "nproc_per_node": 4},
        {"parallel": {"ulysses_degree": 5}, "nproc_per_node": "auto"},  # only the ranks know how many they are
        {"inputs": {"schemes": ["file"], "roots": ["/srv"]}},
    ],
)
def test_what_works_is_no_fault(settings: dict[str, object], tmp_path: Path) -> None:
    """Only the model that is not there is told."""
    assert len(faults(tmp_path, **settings)) == 1


def test_torch_is_not_needed_for_it() -> None:
    """The launcher and its checks import no torch: it has no use for a gigabyte of it."""
    code = "import sys, daemon.launcher; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
