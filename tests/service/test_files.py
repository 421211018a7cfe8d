"""The files in systemd/: what systemd itself says of them, and that the examples do what they say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from daemon import launcher
from tests.service.booted import CHECKOUT
from tests.service.machine import Machine

# `systemd-analyze security` of the unit, in tenths; docs/systemd.md says why each remaining exposure is there.
EXPOSURE = 16


def test_the_units_verify_clean(machine: Machine) -> None:
    """systemd-analyze verify has nothing to say, not even a warning."""
    done = machine.run("systemd-analyze", "verify", "reeld@wan-14b.service", "reeld.target")
    assert (done.stdout, done.stderr) == ("", "")


def test_the_exposure_is_as_stated_and_each_rest_of_it_is_explained(machine: Machine) -> None:
    """The score is the one in docs/systemd.md, which has a line for everything that counts towards it."""
    command = ("systemd-analyze", "security", "--offline=true", "--no-pager")
    done = machine.run(*command, f"--threshold={EXPOSURE}", "/usr/lib/systemd/system/reeld@.service")
    document = (CHECKOUT / "docs" / "systemd.md").read_text()
    assert f"**{EXPOSURE / 10}**" in document
    remaining = re.findall(r"^✗ (\S+)", done.stdout, re.MULTILINE)
    assert len(remaining) > 5
    assert [name for name in remaining if f"`{name}`" not in document] == []
    below = machine.run(*command, f"--threshold={EXPOSURE - 1}", "/usr/lib/systemd/system/reeld@.service", check=False)
    assert below.returncode != 0


def test_the_launchers_folder_is_not_cleaned_away_by_age(tmp_path: Path) -> None:
    """Real systemd-tmpfiles, told to clean everything: what a running launcher holds stays, and what nobody holds goes.
    Many systems clean /tmp by age, and the private one of a unit with it."""
    for name in ("held", "left"):
        (tmp_path / "tmp" / name).mkdir(parents=True)
        (tmp_path / "tmp" / name / "ready").touch()
    rules = tmp_path / "tmp.conf"
    rules.write_text(f"d {tmp_path}/tmp - - - 0\n")
    with launcher._kept(tmp_path / "tmp/held"):
        subprocess.run(["systemd-tmpfiles", "--clean", str(rules)], check=True, capture_output=True, timeout=60)
    assert [path.relative_to(tmp_path / "tmp") for path in (tmp_path / "tmp").rglob("ready")] == [Path("held/ready")]


def test_the_target_is_all_instances(machine: Machine) -> None:
    """An enabled instance comes and goes with reeld.target, and that with the machine."""
    try:
        machine.systemctl("enable", "reeld@wan-a.service", "reeld.target")
        assert machine.show("reeld.target")["Wants"] == "reeld@wan-a.service"
        assert "reeld@wan-a.service" in machine.show("reeld.target")["ConsistsOf"].split()  # of all that are loaded
        assert "reeld.target" in machine.show("multi-user.target")["Wants"].split()
    finally:
        machine.systemctl("disable", "reeld@wan-a.service", "reeld.target")


def test_an_enabled_instance_starts_with_the_box(tmp_path: Path) -> None:
    """`systemctl enable reeld@INSTANCE` is enough: nobody enables the target as well. The target still has it, too."""
    units = tmp_path / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for name in ("reeld@.service", "reeld.target"):
        shutil.copy(CHECKOUT / "systemd" / name, units)
    subprocess.run(["systemctl", f"--root={tmp_path}", "enable", "reeld@wan"], check=True, capture_output=True)
    made = (tmp_path / "etc/systemd/system").glob("*.wants/reeld@wan.*")
    assert {link.parent.name for link in made} == {"multi-user.target.wants", "reeld.target.wants"}


def test_the_target_stops_an_instance_that_was_enabled_alone(machine: Machine) -> None:
    """`systemctl stop reeld.target` reaches what runs, though nobody has started the target itself."""
    machine.write(
        "/etc/systemd/system/reeld@alone.service.d/sleep.conf",
        "[Service]\nType=exec\nExecStart=\nExecStart=sleep infinity\nWatchdogSec=0\n",
    )
    machine.systemctl("daemon-reload")
    try:
        machine.systemctl("enable", "--now", "reeld@alone.service")
        assert machine.show("reeld.target")["ActiveState"] == "inactive"
        assert machine.show("reeld@alone.service")["ActiveState"] == "active"
        machine.systemctl("stop", "reeld.target")
        assert machine.show("reeld@alone.service")["ActiveState"] == "inactive"
    finally:
        machine.systemctl("disable", "--now", "reeld@alone.service")
        machine.run("rm", "-r", "/etc/systemd/system/reeld@alone.service.d")
        machine.systemctl("daemon-reload")


_CHECKED = """
device = "cpu"
work_directory = "/var/lib/reeld/checked/work"
[output]
directory = "/var/lib/reeld/checked/output"
[log]
directory = "/var/log/reeld/checked"
[[models]]
profile = "tiny-t2v"
path = "/srv/models/tiny-t2v"
"""


def test_a_check_by_root_takes_nothing_from_the_units_user(machine: Machine) -> None:
    """`reeld run --check` makes no folder, so none that belongs to root. One that does is found: by a check as the
    unit's user, and by `reeld doctor`."""
    machine.write("/etc/reeld/checked.toml", _CHECKED)
    reeld = "/opt/reeld/current/bin/reeld"
    check = (reeld, "run", "--check", "--config", "/etc/reeld/checked.toml")
    try:
        machine.run(*check)
        machine.run("runuser", "-u", "reeld", "--", *check)
        assert machine.run("find", "/var/lib/reeld", "/var/log/reeld", "-name", "checked").stdout == ""
        machine.run("install", "-d", "/var/lib/reeld/checked/output")
        machine.run(*check)
        refused = machine.run("runuser", "-u", "reeld", "--", *check, check=False)
        assert refused.returncode == 78
        assert refused.stderr.splitlines() == [
            "reeld: output.directory: /var/lib/reeld/checked/output: not writable: Permission denied",
            "reeld: work_directory: /var/lib/reeld/checked/work: not writable: Permission denied",
        ]
        doctor = machine.run("env", "COLUMNS=200", reeld, "doctor", "--config", "/etc/reeld/checked.toml", check=False)
        assert "the service's user, reeld, cannot write to /var/lib/reeld/checked/output" in doctor.stdout
    finally:
        machine.run("rm", "-rf", "/etc/reeld/checked.toml", "/var/lib/reeld/checked")


@pytest.mark.parametrize(
    ("text", "says"),
    [("bogus = 1\n" + _CHECKED, "bogus: Extra inputs"), (_CHECKED.replace("tiny-t2v", "tiny-i2v", 1), "tiny-t2v")],
)
def test_faults_before_the_start_are_in_the_journal_as_json(machine: Machine, text: str, says: str) -> None:
    """What ends the unit before there are logs looks like what ends it later: a pipeline parses it, field by field."""
    machine.write("/etc/reeld/faults.toml", text)
    try:
        machine.systemctl("start", "reeld@faults", check=False)
        (line,) = machine.logs("reeld@faults.service")
        assert (line["event"], line["level"], line["exit_status"], line["rank"]) == ("fatal", "critical", 78, None)
        assert says in line["reason"]
    finally:
        machine.run("rm", "/etc/reeld/faults.toml")
        machine.run("journalctl", "--rotate", "--vacuum-time=1ms")
        machine.systemctl("reset-failed")


def test_the_directories_have_their_owners(machine: Machine) -> None:
    """sysusers.d and tmpfiles.d give the unit's user its directories, and keep credentials to root."""
    shown = machine.run("stat", "-c", "%n %U %a", "/etc/reeld", "/etc/credstore", "/var/cache/reeld", "/var/log/reeld")
    assert shown.stdout.splitlines() == [
        "/etc/reeld root 755",
        "/etc/credstore root 700",
        "/var/cache/reeld reeld 750",
        "/var/log/reeld reeld 750",
    ]


def test_two_instances_split_the_gpus(machine: Machine) -> None:
    """The examples' drop-ins give each instance cards of its own, and its own caches."""
    machine.run("cp", "-r", "/opt/reeld/src/systemd/examples/two-instances/.", "/etc/systemd/system")
    machine.systemctl("daemon-reload")
    try:
        seen = {name: machine.show(f"reeld@{name}.service")["Environment"].split() for name in ("wan-a", "wan-b")}
    finally:
        machine.run("sh", "-c", "rm -r /etc/systemd/system/reeld@wan-?.service.d")
        machine.systemctl("daemon-reload")
    cards = {name: [each for each in given if each.startswith("CUDA_VISIBLE_DEVICES")] for name, given in seen.items()}
    assert cards == {"wan-a": ["CUDA_VISIBLE_DEVICES=0,1,2,3"], "wan-b": ["CUDA_VISIBLE_DEVICES=4,5,6,7"]}
    assert "TRITON_CACHE_DIR=/var/cache/reeld/wan-a/triton" in seen["wan-a"]


@pytest.mark.parametrize("name", ["reeld.toml"])
def test_the_packaged_configuration_is_valid(machine: Machine, name: str) -> None:
    """The example that is installed says nothing that reeld does not take; its model folder is all it lacks."""
    done = machine.run(
        "/opt/reeld/current/bin/reeld",
        "run",
        "--check",
        "--config",
        f"/opt/reeld/src/systemd/examples/{name}",
        check=False,
    )
    assert done.returncode == 78
    assert done.stderr.splitlines() != []
    assert all("/var/lib/reeld/models" in line for line in done.stderr.splitlines()), done.stderr
