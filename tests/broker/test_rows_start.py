"""Rows 12 and 13 of the fault matrix: what ends `reeld run` before anything is loaded."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pika
import pytest

from daemon import client
from daemon.sections import BrokerConfig
from ops.private_broker import PrivateBroker, free_ports
from tests.broker.daemon_under_fault import TOPOLOGY, daemon_config
from tests.harness import Worker
from tests.node import Node

_TLS = """
listeners.ssl.1 = 127.0.0.1:{port}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/server.pem
ssl_options.keyfile = {folder}/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
"""


def _fatal_lines(url: str, folder: Path, models: Path, *, broker: str = "", status: int) -> list[str]:
    """What a `reeld run` says that must end at once with `status`."""
    config = daemon_config(folder, models, broker=f"[broker]\n{broker}")
    worker = Worker(config, url, folder)
    try:
        assert worker.process.wait(120) == status, worker.tail()
        logs = worker.logs()
    finally:
        worker.end()
    assert not [line for line in logs if line["event"] in ("starting_ranks", "model_loaded")], "no restart loop"
    assert "guest:" not in worker.log_path.read_text()
    return [line["reason"] for line in logs if line["event"] == "fatal" and line["exit_status"] == status]


def test_row_12_topology_mismatch_is_a_diff_and_78(vhost: str, models: Path, tmp_path: Path) -> None:
    """A topology that is not as planned is printed object by object, with both values; exit 78, nothing is loaded."""
    with closing(pika.BlockingConnection(pika.URLParameters(vhost))) as connection:
        arguments: dict[str, Any] = next(
            each for each in TOPOLOGY.queues() if each.name == TOPOLOGY.dead_queue
        ).arguments
        connection.channel().queue_declare(TOPOLOGY.dead_queue, durable=True, arguments=arguments)
        arguments = {**TOPOLOGY.queues()[0].arguments, "x-delivery-limit": 7}
        connection.channel().queue_declare(TOPOLOGY.jobs_queue, durable=True, arguments=arguments)
    lines = _fatal_lines(vhost, tmp_path, models, status=78)
    assert "topology differs" in lines[0]
    missing = [line for line in lines if line.startswith("- ")]
    assert f"- exchange {TOPOLOGY.jobs_exchange}: missing" in " ".join(missing)
    assert not any(TOPOLOGY.dead_queue + ":" in line for line in lines), "that one is as planned"
    (differs,) = [line for line in lines if line.startswith("~ ")]
    assert TOPOLOGY.jobs_queue in differs
    assert "x-delivery-limit" in differs
    assert "'3'" in differs
    assert "'7'" in differs


def test_row_13_wrong_password_is_77(broker: PrivateBroker, models: Path, tmp_path: Path) -> None:
    """A refused password ends the daemon with 77, and is not in the logs."""
    url = broker.amqp_url.replace("guest:guest", "guest:wrong")
    (line,) = _fatal_lines(url, tmp_path, models, status=77)
    assert "refused the user or the password" in line


def test_row_13_wrong_vhost_is_77(broker: PrivateBroker, models: Path, tmp_path: Path) -> None:
    """A virtual host that is not there ends the daemon with 77, and a message of its own."""
    (line,) = _fatal_lines(broker.amqp_url.removesuffix("%2F") + "nowhere", tmp_path, models, status=77)
    assert "refused the virtual host 'nowhere'" in line


def test_row_13_tls_to_a_plain_port_is_78(broker: PrivateBroker, models: Path, tmp_path: Path) -> None:
    """TLS to a port that speaks plain AMQP ends the daemon with 78, and a message of its own."""
    (line,) = _fatal_lines(broker.amqp_url.replace("amqp:", "amqps:"), tmp_path, models, status=78)
    assert "no TLS on that port" in line


@pytest.fixture(scope="module")
def tls_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of a broker that speaks TLS, and the folder with its certificate authority (ca.pem)."""
    folder = tmp_path_factory.mktemp("tls")
    _certificates(folder)
    port = free_ports(1)[0]
    with Node(folder, config=_TLS.format(port=port, folder=folder)):
        yield f"amqps://guest:guest@localhost:{port}/%2F", folder


def test_row_13_untrusted_certificate_is_78(tls_url: tuple[str, Path], models: Path, tmp_path: Path) -> None:
    """A certificate that ca_file does not vouch for ends the daemon with 78, and a message of its own."""
    url, folder = tls_url
    (line,) = _fatal_lines(url, tmp_path, models, broker=f'ca_file = "{folder}/other-ca.pem"', status=78)
    assert "certificate is not trusted" in line


def test_row_13_a_trusted_certificate_is_accepted(tls_url: tuple[str, Path], models: Path, tmp_path: Path) -> None:
    """With the right ca_file, and a certificate of our own, which this broker asks for, the same broker is spoken to:
    what is wrong then is the topology only."""
    url, folder = tls_url
    ours = f'ca_file = "{folder}/ca.pem"\ncert_file = "{folder}/server.pem"\nkey_file = "{folder}/server.key"'
    lines = _fatal_lines(url, tmp_path, models, broker=ours, status=78)
    assert "topology differs" in lines[0]


def test_row_13_commands_have_a_certificate_of_their_own_too(tls_url: tuple[str, Path]) -> None:
    """Without a configuration the same files are given by options, or by the configuration's variables."""
    url, folder = tls_url
    ca, certificate, key = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    broker = BrokerConfig(url=url, ca_file=ca, cert_file=certificate, key_file=key)
    client.apply_on(broker, TOPOLOGY)

    def reeld(command: str, **variables: object) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("REELD_")}
        environment |= {"REELD_AMQP_URL": url, "REELD_BROKER__CA_FILE": str(ca)}
        environment |= {f"REELD_BROKER__{name}": str(value) for name, value in variables.items()}
        words = [sys.executable, "-m", "ops.cli", *command.split()]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)

    submit = f"submit --pool {TOPOLOGY.pool} --prompt x --job-id fox-1"
    assert reeld(submit).returncode == 75
    done = reeld(f"{submit} --cert-file {certificate} --key-file {key}")
    assert (done.returncode, done.stdout) == (0, "fox-1\n"), done.stderr
    for command in (f"dlq list --pool {TOPOLOGY.pool}", "drain nobody"):
        done = reeld(command, CERT_FILE=certificate, KEY_FILE=key)
        assert done.returncode == (1 if "drain" in command else 0), done.stderr
    assert "nobody: no such worker listens" in done.stderr


def test_row_13_a_certificate_of_our_own_that_is_none_is_78(models: Path, tmp_path: Path) -> None:
    """What is no certificate and key ends the daemon with 78, and names both files."""
    (tmp_path / "cert.pem").write_text("none")
    broker = f'cert_file = "{tmp_path}/cert.pem"\nkey_file = "{tmp_path}/key.pem"'
    config = daemon_config(tmp_path, models, broker=f"[broker]\n{broker}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REELD_")}
    words = [sys.executable, "-m", "ops.cli", "run", "--config", str(config)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert "broker.cert_file" in line
    assert "broker.key_file" in line


def _certificates(folder: Path) -> None:
    """Two authorities, and a server certificate for localhost from the first."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    for name in ("ca", "other-ca"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")  # fmt: skip
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "server.key",
            "-out", "server.csr", "-subj", "/CN=localhost")  # fmt: skip
    (folder / "names").write_text("subjectAltName = DNS:localhost, IP:127.0.0.1\n")
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "names", "-out", "server.pem")  # fmt: skip
    for key in folder.glob("*.key"):
        key.chmod(0o644)
