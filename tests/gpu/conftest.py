"""Tests that need GPUs run only where TEST_DEVICE=cuda asks for them, and then they fail where there is none.

Elsewhere they are skipped, with this reason in the report: CI has no GPU.
"""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests, and skips them where no GPU is asked for."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")
            if os.environ.get("TEST_DEVICE") != "cuda":
                item.add_marker(pytest.mark.skip(reason="needs TEST_DEVICE=cuda and a GPU"))
