"""The files in systemd/: what systemd itself says of them, and that the examples do what they say."""

import re

import pytest

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


def test_the_target_is_all_instances(machine: Machine) -> None:
    """An enabled instance comes and goes with reeld.target, and that with the machine."""
    try:
        machine.systemctl("enable", "reeld@wan-a.service", "reeld.target")
        assert machine.show("reeld.target")["Wants"] == "reeld@wan-a.service"
        assert machine.show("reeld.target")["ConsistsOf"] == "reeld@wan-a.service"
        assert "reeld.target" in machine.show("multi-user.target")["Wants"].split()
    finally:
        machine.systemctl("disable", "reeld@wan-a.service", "reeld.target")


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
