"""A release: a virtual environment with reeld and everything of requirements.lock in it, ready to be switched to.

A box may have wheels of its own (an attention kernel that was built there), which go into each of its releases. Owns a
release's name (of version and content), building it, and which interpreters can serve a hardened unit. It is built
beside the others and renamed when it is whole, so that what runs is not touched. Leaves out switching to it
(`ops.service_install`).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from daemon import __version__
from ops.failure import CommandFailedError, UsageError

_PACKAGES = ("daemon", "parallel", "ops")
_FILES = ("pyproject.toml", "requirements.lock", "README.md", "LICENSE")
# ProtectHome= makes these empty for the unit.
_HIDDEN = ("/home", "/root", "/run/user")


def source_tree() -> Path:
    """The checkout that this command runs from. Raises UsageError for an installed copy, which lacks what is needed."""
    root = Path(__file__).resolve().parents[1]
    missing = [name for name in ("requirements.lock", "systemd", "docs") if not (root / name).exists()]
    if missing:
        raise UsageError(f"{root} is not a checkout of reeld (no {', '.join(missing)}): run .venv/bin/reeld of one")
    return root


def release_name(source: Path, wheels: Sequence[Path] = ()) -> str:
    """The version, and a digest of all that is installed with it, units too: another content is another release."""
    digest = hashlib.sha256()
    named = [(str(path.relative_to(source)), path) for path in _content(source)] + [
        (each.name, each) for each in wheels
    ]
    for name, path in named:
        with path.open("rb") as file:
            digest.update(f"{name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return f"{__version__}-{digest.hexdigest()[:12]}"


def interpreter(python: Path | None) -> Path:
    """What the release shall run on. Raises UsageError when the unit's user could not see or use it."""
    chosen = python or next((path for path in (Path("/usr/bin/python3"), _own()) if _is_new_enough(path)), _own())
    real = chosen.resolve()
    if not _is_new_enough(chosen):
        raise UsageError(f"{chosen}: not a Python 3.11 or newer")
    if any(real.is_relative_to(hidden) for hidden in _HIDDEN):
        raise UsageError(f"{real}: the service sees nothing of {', '.join(_HIDDEN)}; name another one with --python")
    return chosen


def build(source: Path, target: Path, *, python: Path, wheels: Sequence[Path] = ()) -> None:
    """Makes the release `target`; takes a minute and 6 GB of disk. Raises CommandFailedError with uv's own words."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    # Relocatable: its scripts find the interpreter beside them, whatever the folder is called by then.
    _uv("venv", "--quiet", "--relocatable", "--python", str(python), str(partial))
    into = ("--quiet", "--python", str(partial / "bin" / "python"))
    _uv("pip", "sync", *into, "--require-hashes", str(source / "requirements.lock"))
    with tempfile.TemporaryDirectory() as folder:  # setuptools builds in place, which a checkout is not for
        for package in _PACKAGES:
            shutil.copytree(source / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in _FILES:
            shutil.copy(source / name, folder)
        _uv("pip", "install", *into, "--no-deps", "--no-build-isolation", folder)
    if wheels:  # without what they ask for: the lock stays as it is
        _uv("pip", "install", *into, "--no-deps", "--no-index", *map(str, wheels))
    shutil.copytree(source / "docs", partial / "share" / "doc" / "reeld")
    # The unit may not write here: without the compiled files each start would compile some thousand modules anew.
    compiling = [str(partial / "bin" / "python"), "-m", "compileall", "-q", "-j", "0", str(partial / "lib")]
    subprocess.run(compiling, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Files come with the modes that they have in the checkout and in uv's cache, where somebody's umask has made them.
    subprocess.run(["chmod", "-R", "u=rwX,go=rX", str(partial)], check=True)
    partial.rename(target)


def _uv(*arguments: str) -> None:
    uv = Path(sys.executable).with_name("uv")
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    environment.pop("VIRTUAL_ENV", None)
    done = subprocess.run([str(uv), *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandFailedError(f"uv {' '.join(arguments[:2])} failed:\n{done.stderr.strip()[-2000:]}")


def _content(source: Path) -> Iterator[Path]:
    yield from (source / name for name in _FILES)
    for package in (*_PACKAGES, "docs", "systemd"):
        files = (path for path in (source / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        yield from sorted(files)


def _own() -> Path:
    return Path(getattr(sys, "_base_executable", sys.executable))


def _is_new_enough(path: Path) -> bool:
    try:
        asked = [str(path), "-c", "import sys, venv; sys.exit(sys.version_info < (3, 11))"]
        return subprocess.run(asked, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
