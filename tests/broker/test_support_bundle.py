"""The support bundle of a box whose every corner holds a secret: what is in it, and that no secret is."""

import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from daemon import client
from daemon.config import load_config
from daemon.topology import topology_of
from ops.private_broker import PrivateBroker

PASSWORD = 'S3cr3t"p/w0rd ß'
QUOTED = "S3cr3t%22p%2Fw0rd%20%C3%9F"
KEY = "-----BEGIN PRIVATE KEY-----\nMIGHplantedKeyBytes0123456789\n-----END PRIVATE KEY-----\n"


@pytest.fixture
def user_url(broker: PrivateBroker, vhost: str) -> str:
    """The virtual host's URL with a user whose password is worth hiding."""
    name = vhost.rpartition("/")[2]
    broker.ctl("add_user", f"user-{name}", PASSWORD)
    broker.ctl("set_permissions", "-p", name, f"user-{name}", ".*", ".*", ".*")
    return vhost.replace("guest:guest@", f"user-{name}:{QUOTED}@")


def _bundle(config: Path, archive: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the real command, with no REELD_ variable but the given ones."""
    command = [sys.executable, "-m", "ops.cli", "support-bundle", "--config", str(config), "--output", str(archive)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REELD_")}
    environment = {**clean, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_no_secret_is_in_the_bundle_and_the_rest_is(user_url: str, tmp_path: Path) -> None:
    """Planted: the URL's password in a file and in logs, other variables, systemd's credentials, a TLS key."""
    logs, credentials = tmp_path / "logs", tmp_path / "credentials"
    logs.mkdir()
    credentials.mkdir()
    (tmp_path / "amqp-url").write_text(user_url + "\n")
    (tmp_path / "tls.key").write_text(KEY)
    (credentials / "storage").write_text("planted-credential\n")
    lines = [
        {"event": "connection_lost", "url": user_url, "rank": 0},
        {"event": "crashed", "text": f"refused: {PASSWORD!r} with planted-credential"},
        {"event": "captured_output", "text": f"loaded {KEY} from tls.key", "api_key": "planted-in-a-field"},
        {"event": "ready", "rank": 1},
    ]
    (logs / "rank-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (logs / "tls.key").write_text(KEY)
    config = tmp_path / "reeld.toml"
    config.write_text(
        f'pool = "tiny"\nheartbeat_seconds = 1\n[broker]\nurl = "amqp://other:planted-in-toml@127.0.0.1:1/"\n'
        f'url_file = "{tmp_path}/amqp-url"\n[log]\ndirectory = "{logs}"\n[output]\ndirectory = "{tmp_path}/output"\n'
        f'[[models]]\nprofile = "tiny-t2v"\npath = "/nowhere"\n'
    )
    client.apply_on(load_config(config).broker, topology_of(load_config(config)))
    environment = {
        "CREDENTIALS_DIRECTORY": str(credentials),
        "AWS_SECRET_ACCESS_KEY": "planted-variable",
        "REELD_AMQP_URL": "amqp://another:planted-in-variable@127.0.0.1:1/",
        "REELD_BROKER__URL_FILE": str(tmp_path / "amqp-url"),
        "NCCL_DEBUG": "WARN",
    }
    archive = tmp_path / "bundle.tar.gz"
    done = _bundle(config, archive, **environment)
    assert (done.returncode, done.stdout) == (0, f"{archive}\n"), done.stderr
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600

    with tarfile.open(archive) as opened:
        files = {
            Path(member.name).relative_to(Path(member.name).parts[0]).as_posix(): opened.extractfile(member)
            for member in opened.getmembers()
        }
        content = {name: file.read() for name, file in files.items() if file is not None}
    everything = b"\n".join(content.values())
    for secret in (PASSWORD, json.dumps(PASSWORD)[1:-1], QUOTED, "S3cr3t", "planted"):
        found = [name for name, data in content.items() if secret.encode() in data]
        assert not found, (secret, found)
    assert b"PRIVATE KEY" not in everything

    assert set(content) >= {"README.txt", "versions.json", "configuration.json", "doctor.json", "topology.txt",
                            "environment.json", "logs/rank-0.jsonl", "not-gathered.txt"}  # fmt: skip
    assert json.loads(content["environment.json"])["NCCL_DEBUG"] == "WARN"
    assert json.loads(content["configuration.json"])["pool"] == "tiny"
    assert {finding["name"] for finding in json.loads(content["doctor.json"])} >= {"broker", "topology", "clock"}
    assert "reeld.jobs.tiny" in content["topology.txt"].decode()
    assert content["topology.txt"].decode().endswith("none")
    kept = [json.loads(line) for line in content["logs/rank-0.jsonl"].splitlines()]
    assert [line["event"] for line in kept] == ["connection_lost", "crashed", "captured_output", "ready"]
    assert kept[3] == {"event": "ready", "rank": 1}
    assert not [name for name in content if "key" in name], "no file but the logs is copied"


def test_a_broken_configuration_and_no_broker_still_give_a_bundle(tmp_path: Path) -> None:
    """What cannot be gathered is listed; an archive that is there already is not written over."""
    config = tmp_path / "reeld.toml"
    config.write_text("bogus = 1\n")
    archive = tmp_path / "bundle.tar.gz"
    done = _bundle(config, archive)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as opened:
        (member,) = (each for each in opened.getmembers() if each.name.endswith("configuration-faults.txt"))
        file = opened.extractfile(member)
        assert file is not None
        assert b"bogus" in file.read()
    again = _bundle(config, archive)
    assert again.returncode == 1
    assert "File exists" in again.stderr


def test_a_url_that_is_cut_wrongly_leaves_nothing_in_the_bundle(tmp_path: Path) -> None:
    """A password with an unescaped / is in no file of the archive, and not in one that a library wrote it into."""
    (tmp_path / "amqp-url").write_text("amqp://u:S3cretPart/w0rd@host:5672/")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank-0.jsonl").write_text('{"trace": "ValueError: Port could not be cast to integer: \'S3cretPart\'"}\n')
    config = tmp_path / "reeld.toml"
    config.write_text(
        f'[broker]\nurl_file = "{tmp_path}/amqp-url"\n[log]\ndirectory = "{logs}"\n'
        '[[models]]\nprofile = "tiny-t2v"\npath = "/nowhere"\n'
    )
    archive = tmp_path / "bundle.tar.gz"
    done = _bundle(config, archive)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as opened:
        content = {member.name: opened.extractfile(member) for member in opened.getmembers()}
        text = {name: file.read().decode() for name, file in content.items() if file is not None}
    for secret in ("S3cretPart", "w0rd"):
        assert not [name for name, each in text.items() if secret in each]
    (not_gathered,) = (each for name, each in text.items() if name.endswith("not-gathered.txt"))
    assert "broker.url_file" in not_gathered
