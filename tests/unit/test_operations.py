"""The runbook leaves nothing out: every alert, every exit status, every error code, every command it names."""

import re
from pathlib import Path

from daemon.errors import ErrorCode, ExitStatus

ROOT = Path(__file__).resolve().parents[2]
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()
RULES = ROOT / "systemd" / "prometheus" / "reeld.rules.yml"


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables under a heading, without their heads."""
    section = RUNBOOK.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_exit_status_is_explained() -> None:
    """Number and name, and what to do; none that there is not."""
    found = {int(cells[0]): cells[1].strip("`") for cells in rows("Exit statuses") if cells[0].isdigit()}
    assert found == {int(status): status.name for status in ExitStatus}
    assert all(len(cells) == 4 and cells[3] for cells in rows("Exit statuses"))


def test_every_error_code_says_what_to_do() -> None:
    found = [cells[0].strip("`") for cells in rows("Dead letters") if cells[0].startswith("`")]
    assert found == [str(code) for code in ErrorCode]


def test_every_alert_has_a_heading_with_advice() -> None:
    alerts = re.findall(r"^\s*- alert: (\w+)", RULES.read_text(), re.MULTILINE)
    assert alerts
    sections = dict(re.findall(r"^### (\w+)\n\n(.+?)(?=\n##|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
    assert set(alerts) <= set(sections)
    assert all(len(sections[alert]) > 100 for alert in alerts)


def test_every_command_of_the_runbook_is_there() -> None:
    """`reeld WORD` in the text is a command of `reeld`."""
    import typer.main

    from ops.cli import app

    group = typer.main.get_command(app)
    commands = set(getattr(group, "commands", {}))
    code = " ".join(re.findall(r"`[^`]+`", RUNBOOK)).replace("sudo -u reeld ", "sudo ")  # there it is the user
    named = set(re.findall(r"\breeld ([a-z][a-z-]+)\b", code))
    assert named - commands == set()
    assert len(named) > 8
