"""`reeld doctor` against a real broker and real TLS: what is right, what is wrong, and what would mend it."""

import contextlib
import os
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import client
from daemon.config import Config
from daemon.sections import BrokerConfig, LimitsConfig, ModelConfig, TopologyConfig
from daemon.topology import topology_of
from ops.doctor import table
from ops.doctor_broker import examine_broker
from ops.doctor_machine import clock, examine_directory, examine_machine
from ops.doctor_tls import examine_tls
from ops.finding import Finding
from tests.node import Node


def config_for(url: str, **limits: int) -> Config:
    return Config(
        pool="tiny",
        nproc_per_node=2,
        broker=BrokerConfig(url=url),
        topology=TopologyConfig(apply=False),
        limits=LimitsConfig(**limits),
        models=(ModelConfig(profile="tiny-t2v", path=Path("/nowhere")),),
    )


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_broker_as_it_should_be(vhost: str) -> None:
    """Every check of the broker is made and passes; what cannot be asked for is said to be so."""
    config = config_for(vhost)
    assert client.apply_on(config.broker, topology_of(config)) == []
    found = by_name(examine_broker(config))
    assert {name: finding.state for name, finding in found.items()} == dict.fromkeys(found, "ok")
    assert set(found) >= {"broker", "frame size", "message size", "topology", "delivery limit", "queues"}
    assert "cannot be asked" in found["consumer timeout"].text
    assert found["queues"].text == "0 jobs wait, 0 dead letters, 0 last events without listener"


def test_what_is_wrong_has_a_fix(vhost: str) -> None:
    """A topology that is missing, and dead letters that wait."""
    config = config_for(vhost)
    assert by_name(examine_broker(config))["topology"].fix.startswith("`reeld topology apply`")
    client.apply_on(config.broker, topology_of(config))
    client.publish_job(config.broker.model_copy(update={"prefix": "reeld"}), pool="tiny", body=b"x", message_id="a")
    assert by_name(examine_broker(config))["queues"].text.startswith("1 jobs wait")


def test_limits_of_the_broker_are_tried(tmp_path: Path) -> None:
    """A broker that takes less than `limits.max_body_bytes`, and small frames: both are found by doing it."""
    with Node(tmp_path, config="max_message_size = 65536\nframe_max = 16384\n") as node:
        found = by_name(examine_broker(config_for(node.amqp_url, max_body_bytes=100_000)))
        assert (found["message size"].state, found["frame size"].state) == ("fail", "warn")
        assert "65536" in found["message size"].text
        assert "max_message_size" in found["message size"].fix
        found = by_name(examine_broker(config_for(node.amqp_url, max_body_bytes=50_000)))
        assert found["message size"].state == "ok"
        node.ctl("set_vm_memory_high_watermark", "0.00000001")
        found = by_name(examine_broker(config_for(node.amqp_url, max_body_bytes=50_000)))
        assert "alarm" in found["message size"].fix


def certificate(folder: Path, name: str, *, start: str, end: str) -> Path:
    """A certificate that vouches for itself, for one host name. Times are like 260101000000Z. Returns chain and key."""
    folder.mkdir()
    (folder / "index.txt").touch()
    (folder / "serial").write_text("01\n")
    (folder / "ca.conf").write_text(
        "[ca]\ndefault_ca = own\n[own]\ndatabase = index.txt\nserial = serial\nnew_certs_dir = .\npolicy = any\n"
        f"x509_extensions = names\n[any]\ncommonName = supplied\n[names]\nsubjectAltName = DNS:{name}\n"
        "basicConstraints = critical, CA:TRUE\n"
    )

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "key.pem",
            "-out", "csr.pem", "-subj", f"/CN={name}")  # fmt: skip
    openssl("ca", "-batch", "-selfsign", "-config", "ca.conf", "-keyfile", "key.pem", "-in", "csr.pem", "-out",
            "cert.pem", "-startdate", start, "-enddate", end, "-md", "sha256", "-notext")  # fmt: skip
    return folder


@contextlib.contextmanager
def tls_server(folder: Path) -> Iterator[int]:
    """Does TLS handshakes with the folder's certificate; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted, _ = server.accept()
                    with accepted, contextlib.suppress(OSError), context.wrap_socket(accepted, server_side=True):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.mark.parametrize(
    ("name", "years", "state", "says", "fix"),
    [
        ("localhost", ("20", "99"), "ok", "for localhost", ""),
        ("localhost", ("20", "21"), "fail", "expired", "renew the broker's certificate"),
        ("elsewhere", ("20", "99"), "fail", "ostname mismatch", "one made that names localhost"),
    ],
)
def test_certificates(tmp_path: Path, name: str, years: tuple[str, str], state: str, says: str, fix: str) -> None:
    """A certificate that is fine, one that has ended, and one for another host."""
    end = "20990101000000Z" if years[1] == "99" else f"{years[1]}0101000000Z"
    folder = certificate(tmp_path / "tls", name, start=f"{years[0]}0101000000Z", end=end)
    with tls_server(folder) as port:
        broker = BrokerConfig(url=f"amqps://guest:guest@localhost:{port}/", ca_file=folder / "cert.pem")
        (found,) = examine_tls(broker)
        (untrusted,) = examine_tls(broker.model_copy(update={"ca_file": None}))
    assert found.state == state, found
    assert says in found.text
    assert fix in found.fix
    assert untrusted.state == "fail"
    assert "broker.ca_file" in untrusted.fix or state == "fail"


def test_a_password_in_clear_over_the_network_is_warned_about() -> None:
    (found,) = examine_tls(BrokerConfig(url="amqp://user:secret@192.0.2.1/"))
    assert (found.state, "secret" in found.text) == ("warn", False)
    assert list(examine_tls(BrokerConfig(url="amqp://user:secret@localhost/"))) == []


def test_gpus_as_nvidia_smi_tells_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory errors and somebody else's memory are warned about; too few GPUs for the ranks is a failure."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\necho "NVIDIA H100, 81559, 4, 570.1, 0"\necho "NVIDIA H100, 81559, 40000, 570.1, 2"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    config = config_for("amqp://localhost/").model_copy(update={"device": "cuda", "nproc_per_node": 4})
    first, second, too_few = [each for each in examine_machine(config, with_torch=False) if each.name == "GPU"]
    assert (first.state, second.state, too_few.state) == ("ok", "warn", "fail")
    assert "2 uncorrected memory errors" in second.text
    assert "nproc_per_node is 4" in too_few.text


@pytest.mark.parametrize(("device", "state"), [("auto", "warn"), ("cuda", "fail"), ("cpu", "ok")])
def test_a_box_whose_driver_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, state: str) -> None:
    """No nvidia-smi, one that finds no card, and a torch that does not see the cards that it lists: under auto the
    worker would run on the CPU, which is warned about."""
    config = config_for("amqp://localhost/").model_copy(update={"device": device})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert by_name(examine_machine(config, with_torch=False))["GPU"].state == state
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert by_name(examine_machine(config, with_torch=False))["GPU"].state == state
    program.write_text("#!/bin/sh\n" + 'echo "NVIDIA H100, 81559, 4, 570.1, 0"\n' * 2)
    found = by_name(examine_machine(config, with_torch=True))
    assert (found["GPU"].state, found["torch"].state) == ("ok", state)
    assert "CUDA_VISIBLE_DEVICES" in found["torch"].fix or device == "cpu"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask for another user")
def test_a_folder_that_the_services_user_cannot_write_to() -> None:
    """Asked by root, who may write anywhere. Of a folder that is missing it is asked where it will be made."""
    with tempfile.TemporaryDirectory() as name:  # pytest's are below folders for their owner only
        folder = Path(name)
        found = examine_directory("output.directory", folder / "output", user="nobody")
        assert (found.state, found.fix) == ("fail", f"sudo install -d -o nobody {folder / 'output'}")
        assert f"nobody, cannot write to {folder}" in found.text
        assert examine_directory("output.directory", folder, user="nobody").fix == f"sudo chown nobody: {folder}"
        assert examine_directory("output.directory", folder, user="no-such-user").state == "ok"
        folder.chmod(0o777)
        assert examine_directory("output.directory", folder / "output", user="nobody").state == "ok"
        assert not (folder / "output").exists()


def test_the_clock_is_asked_of_the_kernel() -> None:
    found = clock()
    assert (found.state, "ms off" in found.text) in (("ok", True), ("warn", False))


def test_findings_are_text_not_markup() -> None:
    assert table([Finding("a", "warn", "[bold]x", "do [this]")]).row_count == 1
