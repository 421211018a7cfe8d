"""`reeld install` into a tree of its own, as for an image; on a running system it is in `test_unit.py`.

The release is there already, so that nothing is built: `make test-install` builds one.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ops.failure import CommandFailedError, UsageError
from ops.release import interpreter, release_name, source_tree
from ops.service_install import Box, carry_out, plan_install, plan_uninstall


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with the release that would be built."""
    (tmp_path / "opt/reeld/releases" / release_name(source_tree())).mkdir(parents=True)
    return tmp_path


def _files(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file() or path.is_symlink()}


def _install(tree: Path, *, dry_run: bool = False) -> list[str]:
    said: list[str] = []
    carry_out(plan_install(Box(root=tree), python=None), dry_run=dry_run, say=said.append)
    return said


def _uninstall(tree: Path, *, purge: bool) -> None:
    carry_out(plan_uninstall(Box(root=tree), purge=purge), dry_run=False, say=lambda _text: None)


def test_a_dry_run_says_all_and_does_nothing(tree: Path) -> None:
    """It prints the very actions that the next run does."""
    said = _install(tree, dry_run=True)
    assert _files(tree) == set()
    assert _install(tree) == said
    assert any("reeld@.service" in line for line in said)


def test_a_second_run_has_nothing_to_do(tree: Path) -> None:
    """A whole installation is left alone; one file that differs is all that is written again."""
    _install(tree)
    assert os.readlink(tree / "opt/reeld/current") == f"releases/{release_name(source_tree())}"
    assert "reeld:" in (tree / "etc/passwd").read_text()
    assert _install(tree) == []
    (tree / "usr/lib/systemd/system/reeld.target").write_text("[Unit]\n")
    assert f"write {tree}/usr/lib/systemd/system/reeld.target" in _install(tree)
    assert _install(tree) == []


def test_configuration_outlives_an_upgrade_and_an_uninstall(tree: Path) -> None:
    """What people wrote is never touched; --purge removes it, and leaves the videos."""
    mine = {
        "etc/reeld/wan.toml": "pool = 'wan'",
        "etc/credstore/reeld.wan.broker-url": "amqp://x",
        "etc/systemd/system/reeld@wan.service.d/gpus.conf": "[Service]",
        "var/lib/reeld/output/a/video.mp4": "video",
    }
    for name, text in mine.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    accounts = {"etc/passwd", "etc/group", "etc/shadow", "etc/gshadow"}
    _install(tree)
    assert {name: (tree / name).read_text() for name in mine} == mine
    _uninstall(tree, purge=False)
    assert {name for name in _files(tree) if not name.startswith("etc/.")} - accounts == {*mine}
    (tree / "opt/reeld/releases" / release_name(source_tree())).mkdir(parents=True)
    _install(tree)
    _uninstall(tree, purge=True)
    left = {name for name in _files(tree) if not name.startswith("etc/.")} - accounts
    assert left == {"var/lib/reeld/output/a/video.mp4"}


def test_the_release_before_is_kept(tree: Path) -> None:
    """One can go back to it by a link; older ones and halves are removed."""
    releases = tree / "opt/reeld/releases"
    for name in ("0.0.1-old", "0.0.2-before", "0.0.3-half.partial"):
        (releases / name).mkdir()
    (tree / "opt/reeld/current").symlink_to("releases/0.0.2-before")
    _install(tree)
    assert {path.name for path in releases.iterdir()} == {"0.0.2-before", release_name(source_tree())}


def test_what_a_run_that_failed_left_undone_is_done_by_the_next(tree: Path) -> None:
    """The link is switched last: without it there is everything to do again, though the files are there."""
    (tree / "etc/passwd").mkdir(parents=True)
    with pytest.raises(CommandFailedError, match="systemd-sysusers"):
        _install(tree)
    (tree / "etc/passwd").rmdir()
    assert "systemd-sysusers reeld.conf" in _install(tree)
    assert "reeld:" in (tree / "etc/passwd").read_text()
    assert _install(tree) == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One with two packages of the lock only, so that a whole release is built in no time."""
    checkout = tmp_path / "checkout"
    for name in ("daemon", "parallel", "ops", "systemd", "docs"):
        shutil.copytree(source_tree() / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(source_tree() / name, checkout)
    lock = (source_tree() / "requirements.lock").read_text()
    few = re.findall(r"^(?:setuptools|structlog)==.*\\\n(?:    --hash=.*\n)+", lock, re.MULTILINE)
    (checkout / "requirements.lock").write_text("".join(few))
    return checkout


def _install_checkout(checkout: Path, root: Path, *, umask: int = 0o022) -> str:
    command = [sys.executable, "-m", "ops.cli", "install", "--root", str(root)]
    done = subprocess.run(command, cwd=checkout, umask=umask, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_units_user_can_read_it_whatever_the_umask(checkout: Path, tmp_path: Path) -> None:
    """A whole installation by a root with umask 077, from a checkout that was made under it as well."""
    root = tmp_path / "root"
    subprocess.run(["chmod", "-R", "go=", str(checkout)], check=True)
    _install_checkout(checkout, root, umask=0o077)
    made = [*root.glob("opt/**/*"), *root.glob("usr/**/*"), root / "opt", root / "usr", *root.glob("etc/reeld/*")]
    assert (root / "opt/reeld/current/bin/reeld").is_file()
    needed = {False: stat.S_IROTH, True: stat.S_IROTH | stat.S_IXOTH}
    closed = [path for path in made if path.exists() and needed[path.is_dir()] & ~path.stat().st_mode]
    assert closed == []


def test_wheels_of_the_box_go_into_each_release(checkout: Path, tmp_path: Path) -> None:
    """Whatever they ask for, the lock stays as it is; another wheel is another release, and an uninstall leaves it."""
    root = tmp_path / "root"
    wheels = root / "usr/local/lib/reeld/wheels"
    wheels.mkdir(parents=True)
    _write_wheel(wheels, version="1.0")
    assert ", with kernel-1.0-py3-none-any.whl" in _install_checkout(checkout, root)
    assert _imported_version(root) == "1.0"
    assert _install_checkout(checkout, root) == "nothing to do\n"
    (wheels / "kernel-1.0-py3-none-any.whl").unlink()
    _write_wheel(wheels, version="2.0")
    _install_checkout(checkout, root)
    assert _imported_version(root) == "2.0"
    _uninstall(root, purge=True)
    assert [path.name for path in wheels.iterdir()] == ["kernel-2.0-py3-none-any.whl"]


def _write_wheel(folder: Path, *, version: str) -> None:
    info = f"kernel-{version}.dist-info"
    with zipfile.ZipFile(folder / f"kernel-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("kernel.py", f"version = {version!r}\n")
        needs = "Requires-Dist: torch==1.0\n"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: kernel\nVersion: {version}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"kernel.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def _imported_version(root: Path) -> str:
    command = [str(root / "opt/reeld/current/bin/python"), "-P", "-c", "import kernel; print(kernel.version)"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.strip()


def test_an_interpreter_that_the_unit_cannot_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a home, or none at all, is said before anything is built."""
    with pytest.raises(UsageError, match="not a Python"):
        interpreter(tmp_path / "python3")
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    assert interpreter(python) == python
    monkeypatch.setattr("ops.release._HIDDEN", (str(tmp_path),))
    with pytest.raises(UsageError, match="--python"):
        interpreter(python)


@pytest.mark.timeout(1800)
@pytest.mark.skipif("REELD_BUILD_RELEASE" not in os.environ, reason="minutes and 6 GB: make test-install")
def test_a_release_is_built(tmp_path: Path) -> None:
    """The release holds everything of the lock and reeld itself, and nothing in it points back at the checkout."""
    try:
        assert _install(tmp_path)[0].startswith("build ")
        release = tmp_path / "opt/reeld/current"
        script = "import daemon, diffsynth, torch, xfuser; print(daemon.__file__, torch.__file__)"
        command = [str(release / "bin/python"), "-P", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", timeout=600)
        found = [Path(each).resolve() for each in done.stdout.split()]
        assert all(path.is_relative_to(release.resolve()) for path in found), found
        helped = subprocess.run(
            [str(release / "bin/reeld"), "--help"], capture_output=True, text=True, check=True, cwd="/"
        )
        assert "install" in helped.stdout
        assert not list((release.resolve() / "lib").rglob("__editable__*reeld*"))
        assert _install(tmp_path) == []
    finally:
        shutil.rmtree(tmp_path / "opt", ignore_errors=True)  # pytest keeps its folders for three runs
