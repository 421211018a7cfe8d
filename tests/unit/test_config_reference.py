"""docs/configuration.md is what `reeld schema config --markdown` prints, and has every setting."""

import re
from pathlib import Path
from typing import Any

from daemon.config import Config
from ops.config_reference import config_json_schema, config_markdown

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def rows() -> dict[str, list[str]]:
    """The cells behind each setting's name, by `section.name`."""
    found = {}
    section = ""
    for line in config_markdown().splitlines():
        if heading := re.fullmatch(r"## (?:`\[+(\w+)\]+`|Top level)", line):
            section = f"{heading[1]}." if heading[1] else ""
        elif row := re.fullmatch(r"\| `(\w+)` \| (.*) \|", line):
            found[section + row[1]] = row[2].split(" | ")
    return found


def test_the_document_is_what_the_command_prints() -> None:
    """Mend it by `reeld schema config --markdown > docs/configuration.md`."""
    assert REFERENCE.read_text() == config_markdown() + "\n"


def test_every_setting_has_a_row() -> None:
    """The top level's, each section's, and those of the lists of tables."""
    schema = config_json_schema()

    def sections(setting: dict[str, Any]) -> dict[str, Any] | None:
        reference = setting.get("$ref") or setting.get("items", {}).get("$ref")
        return None if reference is None else schema["$defs"][reference.rpartition("/")[2]]["properties"]

    expected = set()
    for name in Config.model_fields:
        inner = sections(schema["properties"][name])
        expected |= {name} if inner is None else {f"{name}.{each}" for each in inner}
    assert set(rows()) == expected


def test_types_bounds_and_defaults_are_as_the_daemon_has_them() -> None:
    """One of each kind."""
    found = rows()
    assert found["nproc_per_node"][:2] == ['`"auto"` or integer, 1 to 64', '`"auto"`']
    assert found["broker.url_file"][:2] == ["path", "none"]
    assert found["limits.max_body_bytes"][:2] == ["integer, at least 1024", "`1048576` (1 MiB)"]
    assert found["topology.retry_delays_seconds"][:2] == ["list: integer, 1 to 86400", "`[10, 60, 300]`"]
    assert found["models.path"][:2] == ["path", "required"]
    assert found["worker_id"][1] == "computed"


def test_every_setting_has_a_meaning() -> None:
    """Its name alone tells nobody what it is for."""
    assert [name for name, cells in rows().items() if not cells[-1].strip()] == []
