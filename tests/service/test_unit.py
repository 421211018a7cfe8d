"""`reeld@.service` on a booted systemd: start, drain, dead and hung processes, and what must not be tried again.

One instance serves all tests that need one that runs; a test that finds it stopped starts it. The ranks are told what
to meet by `tests/faults/sitecustomize.py`.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from ops.private_broker import PrivateBroker
from tests.harness import LOG_FIELDS, Ear, Faults, fresh_vhost, job, publish
from tests.proxy import Proxy
from tests.service.booted import SOURCE
from tests.service.machine import Machine

UNIT = "reeld@test.service"
CONFIG = """
pool = "test"
nproc_per_node = 1
device = "cpu"
dtype = "float32"
heartbeat_seconds = 0.5
[broker]
backoff_max_seconds = 1
[topology]
apply = true
retry_delays_seconds = [1, 2]
[limits]
outcome_grace_seconds = 5
[stall]
floor_seconds = 12
denoise_seconds = 12
silence_seconds = 60
[[models]]
profile = "tiny-t2v"
path = "/srv/models/tiny-t2v"
"""
# A hung launcher shall be noticed soon. Starting and stopping take longer than this: only what the launcher asks for
# lets the unit live.
DROP_IN = """
[Service]
WatchdogSec=12
RestartSec=1
TimeoutStartSec=20
TimeoutStopSec=4
"""
# What a release is made of, and where its units come from.
CONTENT = "daemon parallel ops systemd docs pyproject.toml requirements.lock README.md LICENSE"
LONG = {"seed": 1, "height": 128, "width": 192, "num_frames": 33}


class Service:
    """The instance `test`, and what a test needs around it."""

    def __init__(self, machine: Machine, proxy: Proxy, url: str, ear: Ear, faults: Faults) -> None:
        self.machine, self.proxy, self.url, self.ear, self.faults = machine, proxy, url, ear, faults

    def start(self) -> dict[str, str]:
        """Its properties, once it is active; started if it is not."""
        self.machine.systemctl("start", UNIT)
        return self.machine.show(UNIT)

    def begin_job(self, *, steps: int = 30) -> dict[str, Any]:
        """Publishes a long job, and waits until it is being denoised."""
        message = job(parameters={**LONG, "num_inference_steps": steps})
        publish(self.url, message)
        self.ear.wait(
            lambda seen: (
                seen.routing_key == f"job.{message['job_id']}.progress"
                and seen.data["phase"] == "denoise"
                and seen.data["step"] > 1
            )
        )
        return message

    def newer_checkout(self, name: str) -> str:
        """A copy of this checkout in the machine that is another release."""
        folder = f"/opt/reeld/{name}"
        self.machine.run("sh", "-c", f"mkdir {folder} && cd {SOURCE} && cp -r {CONTENT} {folder}")
        both = f"{folder}/docs/systemd.md {folder}/systemd/tmpfiles.d/reeld.conf"
        self.machine.run("sh", "-c", f"echo '# {name}' | tee -a {both}")
        return folder

    def runs_current(self, unit: dict[str, str]) -> bool:
        """Whether a unit's main process is of the release that is the current one."""
        current = self.machine.run("readlink", "/opt/reeld/current").stdout.strip()
        return self.machine.run("grep", "-q", current, f"/proc/{unit['MainPID']}/cmdline", check=False).returncode == 0

    def pid_of_rank(self) -> str:
        """The process that rank 0 is now, by the machine's count."""
        return str([line["pid"] for line in self.machine.logs(UNIT) if line["rank"] == 0][-1])


@pytest.fixture(scope="module")
def service(machine: Machine, broker: PrivateBroker) -> Iterator[Service]:
    (machine.state / "faults").mkdir(mode=0o777)
    (machine.state / "faults").chmod(0o777)
    faults = Faults(machine.state / "faults")
    with fresh_vhost(broker) as url, Proxy(broker.amqp_port) as proxy:
        machine.write("/etc/reeld/test.toml", CONFIG)
        machine.write(
            "/etc/reeld/test.env",
            "OMP_NUM_THREADS=1\nPYTHONPATH=/srv/faults\nFAULTS_FILE=/var/lib/reeld/faults/faults.json\n",
        )
        machine.write("/etc/credstore/reeld.test.broker-url", proxy.through(url) + "\n", mode="600")
        machine.write(f"/etc/systemd/system/{UNIT}.d/test.conf", DROP_IN)
        machine.systemctl("daemon-reload")
        ear = Ear(url)
        try:
            yield Service(machine, proxy, url, ear, faults)
        finally:
            machine.systemctl("kill", "--signal=SIGKILL", UNIT, check=False)
            machine.systemctl("stop", UNIT, check=False)
            ear.close()


def test_row_01_broker_down_at_start(service: Service) -> None:
    """With the broker down the unit loads, is not READY, and its status says what it waits for; it is READY once the
    broker is up. The broker's URL is a credential, and in nobody's environment."""
    machine = service.machine
    service.proxy.refuse()
    begun = time.monotonic()
    machine.systemctl("start", "--no-block", UNIT)
    waits = machine.wait(UNIT, lambda now: "waiting for the broker: " in now["StatusText"])
    assert waits["ActiveState"] == "activating"
    assert "rank 0 ready" in waits["StatusText"], "loaded all the same"
    time.sleep(max(0.0, begun + 21 - time.monotonic()))  # longer than the unit may take without asking for more
    service.proxy.heal()
    runs = machine.wait(UNIT, lambda now: now["ActiveState"] != "activating")
    assert (runs["ActiveState"], runs["NRestarts"]) == ("active", "0")
    machine.wait(UNIT, lambda now: now["StatusText"] == "rank 0 ready; idle")
    launcher, rank = runs["MainPID"], service.pid_of_rank()
    told = [machine.run("cat", f"/proc/{pid}/environ", f"/proc/{pid}/cmdline").stdout for pid in (launcher, rank)]
    assert not any("amqp://" in text for text in told)
    assert ["NOTIFY_SOCKET=" in text for text in told] == [True, False], "only the launcher speaks to systemd"


def test_killed_rank_restarts_without_the_unit(service: Service) -> None:
    """`kill -9` of a rank in mid-job: the group starts again by itself, the job is done, the unit was active all along.
    Meanwhile the status says which step the job is at, and how long it will take."""
    machine = service.machine
    before = service.start()
    message = service.begin_job()
    now = machine.wait(UNIT, lambda now: " s left" in now["StatusText"])
    assert f"rank 0 ready; job {message['job_id']} step " in now["StatusText"]
    assert "/30, " in now["StatusText"]
    machine.run("sh", "-c", f"kill -KILL {service.pid_of_rank()}")
    assert service.ear.terminal(message["job_id"], timeout=180).name == "succeeded"
    after = machine.show(UNIT)
    same = ("ActiveState", "MainPID", "NRestarts", "ActiveEnterTimestampMonotonic")
    assert [after[name] for name in same] == [before[name] for name in same]


def test_row_18_hung_rank_restarts_without_the_unit(service: Service) -> None:
    """A rank that hangs is noticed by its stall limit, with its stacks in the journal; the group starts again, the job
    is done, and the watchdog has not bitten."""
    machine = service.machine
    before = service.start()
    message = job()
    service.faults.tell(message, "hang", rank=0, step=2)
    publish(service.url, message)
    assert service.ear.terminal(message["job_id"], timeout=180).name == "succeeded"
    after = machine.show(UNIT)
    assert [after[name] for name in ("MainPID", "NRestarts")] == [before[name] for name in ("MainPID", "NRestarts")]
    logs = machine.logs(UNIT)
    assert [line["job_id"] for line in logs if line["event"] == "stalled"] == [message["job_id"]]
    stacks = [line["threads"] for line in logs if line["event"] == "rank_stacks"]
    assert any("_act" in frame for threads in stacks for thread in threads for frame in thread["frames"])


def test_hung_launcher_is_restarted_by_the_watchdog(service: Service) -> None:
    """A launcher that feeds the watchdog no more is killed with its ranks, and the unit starts again."""
    machine = service.machine
    before = service.start()
    machine.systemctl("kill", "--kill-whom=main", "--signal=STOP", UNIT)
    bitten = machine.wait(UNIT, lambda now: now["NRestarts"] != before["NRestarts"])
    assert int(bitten["NRestarts"]) == int(before["NRestarts"]) + 1
    after = machine.wait(UNIT, lambda now: now["ActiveState"] == "active")
    assert after["MainPID"] != before["MainPID"]
    assert any("Watchdog timeout" in entry["MESSAGE"] for entry in machine.journal(UNIT))


def test_an_upgrade_drains_first(service: Service) -> None:
    """`reeld install` from another checkout, in mid-job: the job is finished, then the unit runs the new release.
    Once more there is nothing to do."""
    machine = service.machine
    before = service.start()
    newer = service.newer_checkout("next")
    message = service.begin_job()
    done = machine.install(newer).splitlines()
    assert done[-1] == f"drain and start again: systemctl restart {UNIT}"
    assert service.ear.terminal(message["job_id"], timeout=1).name == "succeeded", "before the install went on"
    after = machine.show(UNIT)
    assert after["ActiveState"] == "active"
    assert after["MainPID"] != before["MainPID"]
    assert service.runs_current(after)
    assert machine.install(newer) == "nothing to do\n"


def test_an_upgrade_outlives_its_installer(service: Service) -> None:
    """`reeld install` and its systemctl are killed while a job is finished: the unit drains all the same, then runs the
    new release. One that drains for an install of before counts as running."""
    machine = service.machine
    before = service.start()
    reeld = machine.reeld_of(service.newer_checkout("killed"))
    message = service.begin_job(steps=60)
    pid = machine.run("sh", "-c", f"setsid {reeld} install >/tmp/killed 2>&1 & echo $!").stdout.strip()
    machine.wait(UNIT, lambda now: now["ActiveState"] == "deactivating")
    machine.run("sh", "-c", f"kill -KILL -{pid}")
    assert machine.show(UNIT)["ActiveState"] == "deactivating"
    after = machine.wait(UNIT, lambda now: now["ActiveState"] == "active")
    assert after["MainPID"] != before["MainPID"]
    assert service.runs_current(after)
    assert service.ear.terminal(message["job_id"], timeout=1).name == "succeeded"
    assert "restart" not in machine.run(reeld, "install").stdout
    reeld = machine.reeld_of(service.newer_checkout("stopped"))
    service.begin_job(steps=60)
    machine.systemctl("stop", "--no-block", UNIT)
    machine.wait(UNIT, lambda now: now["ActiveState"] == "deactivating")
    assert f"systemctl restart {UNIT}" in machine.run(reeld, "install", "--dry-run").stdout


def test_an_upgrade_that_fails_leaves_the_unit_running(service: Service) -> None:
    """A step that fails is said, and the old release serves on; the next run does what is missing. A unit that still
    runs the release before, because the run ended just after the switch, is restarted too."""
    machine = service.machine
    before = service.start()
    reeld = machine.reeld_of(service.newer_checkout("failing"))
    machine.run("mount", "--bind", "/bin/false", "/usr/bin/systemd-tmpfiles")
    failed = machine.run(reeld, "install", check=False)
    machine.run("umount", "/usr/bin/systemd-tmpfiles")
    assert failed.returncode == 1
    assert "systemd-tmpfiles --create reeld.conf: exit status 1" in failed.stderr
    now = machine.show(UNIT)
    assert (now["ActiveState"], now["MainPID"]) == ("active", before["MainPID"])
    said = machine.run(reeld, "install", "--dry-run").stdout
    assert "systemd-tmpfiles --create reeld.conf" in said
    release = reeld.removesuffix("/bin/reeld").rpartition("/")[2]
    machine.run("ln", "-sfn", f"releases/{release}", "/opt/reeld/current")
    assert f"systemctl restart {UNIT}" in machine.run(reeld, "install").stdout
    after = machine.show(UNIT)
    assert after["ActiveState"] == "active"
    assert service.runs_current(after)
    assert machine.run(reeld, "install").stdout == "nothing to do\n"


def test_a_drain_by_the_configuration_meets_the_unit(service: Service) -> None:
    """`reeld drain --config /etc/reeld/INSTANCE.toml`, whose file names no worker, asks the one that the unit runs."""
    machine = service.machine
    service.start()
    url_file = "REELD_BROKER__URL_FILE=/etc/credstore/reeld.test.broker-url"
    words = ("drain", "--config", "/etc/reeld/test.toml", "--wait")
    asked = machine.run("env", url_file, "/usr/local/bin/reeld", *words, check=False)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.splitlines()[-1].endswith("-test: stopped")
    ended = machine.wait(UNIT, lambda now: now["ActiveState"] not in ("active", "deactivating"))
    assert [ended[name] for name in ("ActiveState", "Result", "ExecMainStatus")] == ["inactive", "success", "0"]


def test_row_25_stop_in_mid_job_drains(service: Service) -> None:
    """`systemctl stop` in mid-job lets it finish, says so in the status, and ends with 0 and nothing left over. Every
    line in the journal parses, with the rank, and the job where there is one."""
    machine = service.machine
    service.start()
    message = service.begin_job(steps=60)
    machine.systemctl("stop", "--no-block", UNIT)
    stops = machine.wait(UNIT, lambda now: now["StatusText"].startswith("draining; ") or now["SubState"] == "dead")
    assert stops["SubState"] == "stop-sigterm"
    assert message["job_id"] in stops["StatusText"]
    ended = machine.wait(UNIT, lambda now: now["ActiveState"] not in ("active", "deactivating"))
    assert [ended[name] for name in ("ActiveState", "Result", "ExecMainStatus")] == ["inactive", "success", "0"]
    assert service.ear.terminal(message["job_id"]).name == "succeeded"
    assert (machine.state / "output" / message["job_id"] / "manifest.json").is_file()
    logs = machine.logs(UNIT)
    assert all(set(line) >= LOG_FIELDS for line in logs)
    assert {line["rank"] for line in logs} == {None, 0}
    assert [line for line in logs if line.get("job_id") == message["job_id"] and line["rank"] == 0]


@pytest.mark.parametrize(("instance", "status"), [("faulty", 78), ("stranger", 77)])
def test_what_does_not_mend_itself_is_not_tried_again(service: Service, instance: str, status: int) -> None:
    """Row 13 and bad configurations: one failed start with its own exit status, no restart, and the reason."""
    machine = service.machine
    unit = f"reeld@{instance}.service"
    config = CONFIG.replace("heartbeat_seconds = 0.5", "heartbeat_seconds = 0") if instance == "faulty" else CONFIG
    machine.write(f"/etc/reeld/{instance}.toml", config)
    wrong = service.url.replace("guest:guest", "guest:nobody-knows")
    machine.write(f"/etc/credstore/reeld.{instance}.broker-url", wrong, mode="600")
    assert machine.systemctl("start", unit, check=False).returncode == 1
    failed = machine.show(unit)
    shown = ("ActiveState", "SubState", "NRestarts", "ExecMainStatus")
    assert [failed[name] for name in shown] == ["failed", "failed", "0", str(status)]
    said = "\n".join(str(entry["MESSAGE"]) for entry in machine.journal(unit))
    assert ("heartbeat_seconds" if instance == "faulty" else "refused the user or the password") in said
    assert "nobody-knows" not in said
