"""Who may import whom. The design's layout (``docs/decisions.md`` has the reasons), read from the source.

Every import counts, those inside functions and under ``if TYPE_CHECKING`` too.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("daemon", "parallel", "ops")

# What each package of ours may import of ours: ops -> daemon -> parallel, never backwards.
MAY_IMPORT = {
    "ops": {"ops", "daemon", "parallel"},
    "daemon": {"daemon", "parallel"},
    "parallel": {"parallel"},
}

# Libraries with one owner: nobody else in the product imports them.
ONLY_IN = {"pika": "daemon", "torch": "parallel", "diffsynth": "parallel", "xfuser": "parallel"}


def test_packages_import_in_one_direction() -> None:
    """ops imports daemon and parallel, daemon imports parallel, and nothing goes the other way."""
    backwards = [
        f"{place}: {package} must not import {imported}"
        for package in PACKAGES
        for place, imported in imports_under(ROOT / package)
        if imported in {*PACKAGES, "tests"} - MAY_IMPORT[package]
    ]
    assert backwards == []


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_with_one_owner_stays_with_it(library: str) -> None:
    """pika is spoken in daemon only; torch, DiffSynth and xfuser in parallel only."""
    owner = ONLY_IN[library]
    strangers = [
        f"{place}: only {owner} imports {library}"
        for package in PACKAGES
        if package != owner
        for place, imported in imports_under(ROOT / package)
        if imported == library
    ]
    assert strangers == []


@pytest.mark.parametrize("package", PACKAGES)
def test_our_flat_names_are_ours(package: str) -> None:
    """``daemon``, ``parallel`` and ``ops`` are short names: no other distribution may shadow them."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


def test_systemd_holds_no_python() -> None:
    """systemd/ is for units and their examples; code that runs belongs to the packages."""
    assert list((ROOT / "systemd").rglob("*.py")) == []


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("import daemon.job", ["daemon"]),
        ("def late():\n    from torch.distributed import Store", ["torch"]),
        ("from . import sibling", []),
        ("import importlib\nimportlib.import_module('xfuser.envs')", ["importlib", "xfuser"]),
    ],
)
def test_the_reader_of_imports_sees(source: str, imported: list[str]) -> None:
    """The rules above are worth what this finds: absolute, late and dynamic imports, and no relative ones."""
    assert [name for _, name in imports_in(source)] == imported


def imports_under(package: Path) -> Iterator[tuple[str, str]]:
    """Each import below ``package`` as (file:line, top-level name)."""
    for path in sorted(package.rglob("*.py")):
        for line, name in imports_in(path.read_text()):
            yield f"{path.relative_to(ROOT)}:{line}", name


def imports_in(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name.partition(".")[0]
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module.partition(".")[0]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module.partition(".")[0]
