"""`reeld schema config`: the configuration as JSON Schema, and as the reference in docs/configuration.md.

Owns how a setting's type, bounds and default are written. Leaves out the settings and what they mean (`daemon.config`).
"""

import json
import textwrap
from typing import Any

from daemon.config import Config

_WIDTH = 120
_TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}
_KIB = 1024
_UNITS = ("KiB", "MiB", "GiB")

_HEAD = """
# Configuration

One TOML file, given with `--config` or `REELD_CONFIG`; `reeld run --config FILE --check` finds every fault in it at
once, each with its field. Only `[[models]]` is required. This page is what `reeld schema config --markdown` prints;
`reeld schema config` prints the same as JSON Schema.

Every setting can come from the environment instead, which wins over the file: `REELD_` and its path with `__` between
the parts, as in `REELD_OUTPUT__CRF=20`. Lists are JSON there (`REELD_INPUTS__SCHEMES='["file"]'`), and so are
`REELD_MODELS` and `REELD_LORAS`. `REELD_AMQP_URL` is short for `REELD_BROKER__URL`. A variable that is empty counts as
absent. Under systemd, credentials stand in for four settings of `[broker]` ([systemd.md](systemd.md#credentials)).

Where the default is *none*, the meaning says what happens then; *computed* ones are made at each start.
"""


def config_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the configuration, from the model that `reeld run` validates with."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def config_markdown() -> str:
    """The reference: a table of name, type, default and meaning for the top level and for each section."""
    schema = config_json_schema()
    definitions = schema["$defs"]
    single: dict[str, Any] = {}
    sections: list[tuple[str, dict[str, Any]]] = []
    for name, setting in schema["properties"].items():
        if "$ref" in setting:
            sections.append((f"[{name}]", _resolved(setting, definitions)))
        elif "$ref" in setting.get("items", {}):
            sections.append((f"[[{name}]]", _resolved(setting["items"], definitions)))
        else:
            single[name] = setting
    lines = _wrapped(_HEAD)
    lines += ["", "## Top level", "", *_table(single, required=[])]
    for title, section in sections:
        lines += ["", f"## `{title}`", ""]
        if "description" in section:
            lines += [*_wrapped(section["description"]), ""]
        lines += _table(section["properties"], required=section.get("required", []))
    return "\n".join(lines)


def _resolved(reference: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = definitions[reference["$ref"].rpartition("/")[2]]
    return found


def _wrapped(text: str) -> list[str]:
    """Paragraphs, each filled to the documents' width."""
    paragraphs = [
        textwrap.wrap(paragraph, _WIDTH, break_long_words=False, break_on_hyphens=False)
        for paragraph in text.strip().split("\n\n")
    ]
    return [line for lines in paragraphs for line in (*lines, "")][:-1]


def _table(settings: dict[str, Any], *, required: list[str]) -> list[str]:
    rows = [
        (f"`{name}`", _type_text(setting), _default_text(name, setting, required=name in required), _meaning(setting))
        for name, setting in settings.items()
    ]
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _meaning(setting: dict[str, Any]) -> str:
    return " ".join(str(setting.get("description", "")).split())


def _default_text(name: str, setting: dict[str, Any], *, required: bool) -> str:
    if required:
        return "required"
    if "default" not in setting:
        return "computed"
    default = setting["default"]
    if default is None:
        return "none"
    text = f"`{json.dumps(default, ensure_ascii=False)}`"  # as TOML writes it, too
    size = _size_text(default) if name.endswith("_bytes") else None
    return f"{text} ({size})" if size else text


def _size_text(count: int) -> str | None:
    """`32 MiB`; None for what is no whole number of a unit."""
    for power in (3, 2, 1):
        if count and count % _KIB**power == 0:
            return f"{count // _KIB**power} {_UNITS[power - 1]}"
    return None


def _type_text(setting: dict[str, Any]) -> str:
    if "anyOf" in setting:
        return " or ".join(_type_text(each) for each in setting["anyOf"] if each.get("type") != "null")
    if "enum" in setting:
        return " or ".join(f"`{json.dumps(value)}`" for value in setting["enum"])
    if "const" in setting:
        return f"`{json.dumps(setting['const'])}`"
    if setting["type"] == "array":
        return f"list: {_type_text(setting['items'])}"
    if setting.get("format") == "path":
        return "path"
    if "pattern" in setting:
        return f"text matching `{setting['pattern']}`"
    return _TYPES[setting["type"]] + _bounds_text(setting)


def _bounds_text(setting: dict[str, Any]) -> str:
    low, high = setting.get("minimum"), setting.get("maximum")
    if low is not None and high is not None:
        return f", {low} to {high}"
    bounds = (
        ("at least", low),
        ("above", setting.get("exclusiveMinimum")),
        ("at most", high),
        ("below", setting.get("exclusiveMaximum")),
    )
    said = [f"{word} {value}" for word, value in bounds if value is not None]
    return f", {', '.join(said)}" if said else ""
