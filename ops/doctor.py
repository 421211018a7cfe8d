"""`reeld doctor`: looks at everything the worker needs and says how to mend what is wrong.

Owns the order of the checks, those of the configuration and the model folders, and how findings look. Leaves out the
broker (`ops.doctor_broker`) and the machine (`ops.doctor_machine`).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from daemon.config import Config, load_config
from daemon.errors import ConfigError
from ops.doctor_broker import examine_broker
from ops.doctor_machine import examine_directory, examine_machine
from ops.finding import Finding
from parallel.profile import ModelFolderError, check_model_folder, load_profile

_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(config_path: Path | None, *, with_torch: bool = False) -> bool:
    """Prints a table of findings. True when nothing failed."""
    findings = list(examine(config_path, with_torch=with_torch))
    Console().print(table(findings))
    return all(finding.state != "fail" for finding in findings)


def table(findings: Iterable[Finding]) -> Table:
    """What was found, and what to do about it, a row each."""
    rows = Table("check", "", Column("found", overflow="fold"))
    for finding in findings:
        found = Text(finding.text)
        if finding.fix:
            found.append(f"\n→ {finding.fix}", style="cyan")
        rows.add_row(finding.name, Text(finding.state, style=_STYLE[finding.state]), found)
    return rows


def examine(config_path: Path | None, *, with_torch: bool = False) -> Iterator[Finding]:
    """Every finding, in the order in which a worker would meet them."""
    try:
        config = load_config(config_path)
    except ConfigError as error:
        yield Finding("configuration", "fail", str(error), "correct these fields; `reeld run --check` checks again")
        yield from examine_machine(None, with_torch=with_torch)
        return
    yield Finding("configuration", "ok", f"{config_path or 'environment'}: pool {config.pool_name}")
    yield from _models(config)
    try:
        yield from examine_broker(config)
    except ConfigError as error:  # url_file cannot be read
        yield Finding("broker", "fail", str(error), "correct [broker] in the configuration")
    yield examine_directory("output.directory", config.output.directory, hard_links=True)
    yield examine_directory("work_directory", config.work_directory)
    if config.log.directory is not None:
        yield examine_directory("log.directory", config.log.directory)
    yield from examine_machine(config, with_torch=with_torch)


def _models(config: Config) -> Iterator[Finding]:
    for model in config.models:
        name = f"model {model.profile}"
        try:
            files = check_model_folder(load_profile(model.profile), model.path)
        except ValueError as error:
            yield Finding(name, "fail", str(error), "correct `profile` in [[models]]")
        except ModelFolderError as error:
            yield Finding(name, "fail", str(error), "put the file there, or correct `path` in [[models]]")
        else:
            count = sum(len(paths) for paths in files.paths.values())
            yield Finding(name, "ok", f"{model.path}: {count} files are whole")
