"""The distribution's tools that only tests need, as `make install` unpacks them into .tools."""

import os
import platform
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".tools"
LIBRARIES = TOOLS / "usr/lib" / f"{platform.machine()}-linux-gnu"


def tool(name: str) -> str:
    """The path of an unpacked program. Fails when it is not there: these tests are never skipped."""
    for folder in ("usr/bin", "usr/sbin"):
        path = TOOLS / folder / name
        if path.exists():
            return str(path)
    raise AssertionError(f"{name} is not in .tools: run `make install`")


def tool_environment() -> dict[str, str]:
    """The environment in which an unpacked program finds its libraries."""
    paths = [LIBRARIES, TOOLS / "lib" / LIBRARIES.name, TOOLS / "usr/lib/syslog-ng"]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, paths))}
