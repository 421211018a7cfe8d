"""The shipped unit with its hardening, on a booted systemd, with a rank on every card.

With TEST_DEVICE=cuda on a machine with GPUs; what is tested without them is in `tests/service`.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.private_broker import PrivateBroker
from tests.gpu.bare_systemd import BareSystemd
from tests.harness import Ear, Seen, fresh_vhost, job, publish
from tests.service.booted import CHECKOUT

UNIT = "reeld@cards.service"
CONFIG = """
pool = "test"
nproc_per_node = "auto"
device = "cuda"
dtype = "bfloat16"
heartbeat_seconds = 0.5
[topology]
apply = true
[[models]]
profile = "tiny-t2v"
path = "/srv/models/tiny-t2v"
"""
# Of this machine, which the unit's environment does not have: where the driver is, and what NCCL may use here.
_HOST = ("LD_LIBRARY_PATH", "IMAGEIO_FFMPEG_EXE", "NCCL_", "NVSHMEM_", "TORCH_SYMM_MEM_", "NVIDIA_", "CUDA_")


class Unit:
    def __init__(self, machine: BareSystemd, ear: Ear, url: str) -> None:
        self.machine, self.ear, self.url = machine, ear, url

    def do(self) -> Seen:
        message = job()
        publish(self.url, message)
        return self.ear.terminal(message["job_id"], timeout=240)

    def start(self) -> None:
        started = self.machine.systemctl("start", UNIT, check=False)
        assert started.returncode == 0, self.machine.explain(UNIT)

    def stop(self) -> None:
        """Drains it: exit 0, by itself."""
        self.machine.systemctl("stop", UNIT)
        ended = self.machine.show(UNIT)
        assert (ended["Result"], ended["ExecMainStatus"]) == ("success", "0"), self.machine.explain(UNIT)


@pytest.fixture(scope="module")
def unit(broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    models.chmod(0o755)
    for folder in models.parents:  # pytest's are for their owner only, and the unit's user is another
        if folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    with (
        BareSystemd(tmp_path_factory.mktemp("systemd"), binds=[(models, "/srv/models", True)]) as machine,
        fresh_vhost(broker) as url,
    ):
        host = {name: value for name, value in os.environ.items() if name.startswith(_HOST)}
        machine.write("/etc/reeld/cards.toml", CONFIG)
        machine.write("/etc/reeld/cards.env", "".join(f"{name}={value}\n" for name, value in host.items()))
        machine.write("/etc/credstore/reeld.cards.broker-url", f"{url}\n", mode="600")
        ear = Ear(url)
        try:
            yield Unit(machine, ear, url)
        finally:
            print(machine.explain(UNIT))
            ear.close()


@pytest.mark.parametrize(("device", "allowed"), [("/dev/nvidiactl", True), ("/dev/kmsg", False)])
def test_device_rules_hold(unit: Unit, device: str, allowed: bool) -> None:
    """Under the unit's `DevicePolicy=` and `DeviceAllow=` even root opens the cards' files only: so the rules are in
    force where the next test runs."""
    unit_file = (CHECKOUT / "systemd" / "reeld@.service").read_text().splitlines()
    rules = "\n".join(line for line in unit_file if line.startswith(("DevicePolicy=", "DeviceAllow=")))
    for name, lines, opens in (("ruled", rules, allowed), ("free", "", True)):
        probe = f"[Service]\nType=oneshot\nExecStart=/bin/sh -c 'exec 3<{device}'\n{lines}"
        unit.machine.write(f"/etc/systemd/system/{name}.service", probe)
        unit.machine.systemctl("daemon-reload")
        assert (unit.machine.systemctl("start", f"{name}.service", check=False).returncode == 0) == opens, name


def test_the_hardened_unit_serves_on_every_card(unit: Unit) -> None:
    """As shipped: READY, a job over NCCL with kernels that Triton compiled, its user's own caches, and a drain."""
    unit.start()
    done = unit.do()
    assert done.name == "succeeded", unit.machine.explain(UNIT)
    cards = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    assert unit.ear.all(name="started")[-1].data["world_size"] == len(cards.stdout.splitlines())
    owners = unit.machine.run("sh", "-c", "find /var/cache/reeld/cards -name '*.so' -printf '%U\\n' | sort -u").stdout
    assert owners.split() == [unit.machine.run("id", "-u", "reeld").stdout.strip()]
    unit.stop()
