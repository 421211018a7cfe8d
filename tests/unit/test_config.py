"""The configuration: read once, judged as a whole, and clear about what is wrong."""

import os
import re
import traceback
from pathlib import Path

import pytest

from daemon.config import Config, load_config
from daemon.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LEAST = '[[models]]\nprofile = "tiny-t2v"\npath = "/models/tiny-t2v"\n'


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("REELD_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "reeld.toml"


def load(file: Path, text: str) -> Config:
    file.write_text(text, encoding="utf-8")
    return load_config(file)


def faults(file: Path | None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert int(caught.value.exit_status) == 78
    return str(caught.value)


def test_a_model_is_all_that_must_be_said(file: Path) -> None:
    """Everything but the models has a default, and the pool is named for the first of them."""
    config = load(file, LEAST)
    assert config.pool_name == "tiny-t2v"
    assert config.models[0].path == Path("/models/tiny-t2v")
    assert config.broker.resolved_url() == "amqp://guest:guest@127.0.0.1:5672/%2F"
    assert config.topology.retry_delays_seconds == (10, 60, 300)


@pytest.mark.parametrize("name", ["systemd/examples/reeld.toml", "README.md"])
def test_what_people_copy_names_the_device(file: Path, name: str) -> None:
    """With auto a box whose driver is gone would take its pool's jobs with it, onto the CPU."""
    text = (ROOT / name).read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL) or [text]
    assert load(file, blocks[0]).device == "cuda"


def test_a_pool_is_named_after_a_profiles_file_or_as_told(file: Path) -> None:
    """A profile's path gives its stem; `pool` wins over both."""
    text = LEAST.replace('"tiny-t2v"\npath', '"/etc/reeld/mine.toml"\npath')
    assert load(file, text).pool_name == "mine"
    assert load(file, 'pool = "fast"\n' + text).pool_name == "fast"


def test_all_faults_are_listed_at_once(file: Path) -> None:
    """Each fault has a line of its own with the file and the path of the field."""
    file.write_text(
        """
        colour = "red"
        nproc_per_node = 0
        [broker]
        url = "http://example.org"
        prefetch_count = 3
        [topology]
        retry_delays_seconds = [60, 10]
        [inputs]
        schemes = ["ftp"]
        [[models]]
        profile = "tiny-t2v"
        """
    )
    lines = faults(file).splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    for path in (
        "colour",
        "nproc_per_node",
        "broker.url",
        "broker.prefetch_count",
        "topology.retry_delays_seconds",
        "inputs.schemes.0",
        "models.0.path",
    ):
        assert any(line.startswith(f"{file}: {path}") for line in lines), path


def test_a_fault_never_repeats_a_password(file: Path) -> None:
    """A wrong URL is reported without what it holds."""
    file.write_text(LEAST + '[broker]\nurl = "http://user:hunter2@example.org"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_the_environment_beats_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable overrides one field, and the section's other fields stay as the file has them."""
    monkeypatch.setenv("REELD_BROKER__PREFIX", "from-environment")
    monkeypatch.setenv("REELD_LOG__LEVEL", "debug")
    monkeypatch.setenv("REELD_DEVICE", "cpu")
    monkeypatch.setenv("REELD_POOL", "")  # empty counts as not set
    config = load(file, 'device = "cuda"\npool = "a"\n' + LEAST + '[broker]\nprefix = "x"\nheartbeat_seconds = 7\n')
    assert (config.broker.prefix, config.broker.heartbeat_seconds) == ("from-environment", 7)
    assert (config.device, config.log.level, config.pool) == ("cpu", "debug", "a")


def test_the_environment_alone_can_be_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file the environment configures everything, lists as JSON."""
    monkeypatch.setenv("REELD_MODELS", '[{"profile": "tiny-t2v", "path": "/m"}]')
    assert load_config(None).models[0].path == Path("/m")


def test_a_fault_in_the_environment_is_listed(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """A wrong value in a variable is a configuration error by the field's path."""
    file.write_text(LEAST)
    monkeypatch.setenv("REELD_BROKER__HEARTBEAT_SECONDS", "soon")
    monkeypatch.setenv("REELD_BROKER__URLL", "amqp://x")
    text = faults(file)
    assert "REELD_BROKER__HEARTBEAT_SECONDS: broker.heartbeat_seconds: " in text
    assert "REELD_BROKER__URLL: broker.urll: " in text


def test_a_wrong_value_is_blamed_on_where_it_is(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """A variable is named for its value, whatever its spelling, and the file for what only the file says."""
    file.write_text('dtype = "float8"\nnproc_per_node = 2\n' + LEAST + '[broker]\nurl = "amqp://host"\nprefix = "?"\n')
    monkeypatch.setenv("reeld_nproc_per_node", "zero")
    monkeypatch.setenv("REELD_AMQP_URL", "http://u:hunter2@host")
    monkeypatch.setenv("REELD_LOG", '{"level": "loud"}')
    monkeypatch.setenv("REELD_LORAS", '[{"name": "a"}]')
    lines = faults(file).splitlines()
    for start in (
        f"{file}: dtype: ",
        f"{file}: broker.prefix: ",
        "REELD_NPROC_PER_NODE: nproc_per_node",
        "REELD_AMQP_URL: broker.url: ",
        "REELD_LOG: log.level: ",
        "REELD_LORAS: loras.0.path: ",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)
    assert "hunter2" not in "".join(lines)


def test_a_mistyped_variable_is_a_fault(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """A setting that nobody reads would be missed only when it matters. All are told, with what was meant, and with
    what else is wrong."""
    for name in ("REELD_NPROC_PERNODE", "REELD_LOGLEVEL", "REELD_POOL__NAME", "REELD_XYZ", "REELD_EMPTY"):
        monkeypatch.setenv(name, "" if name == "REELD_EMPTY" else "4")
    file.write_text("bogus = 1\n" + LEAST)
    assert faults(file).splitlines() == [
        "REELD_LOGLEVEL: no setting has this variable: is REELD_LOG__LEVEL meant?",
        "REELD_NPROC_PERNODE: no setting has this variable: is REELD_NPROC_PER_NODE meant?",
        "REELD_POOL__NAME: no setting has this variable",
        "REELD_XYZ: no setting has this variable",
        f"{file}: bogus: Extra inputs are not permitted",
    ]


def test_variables_that_are_no_settings_are_known(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Whatever variable reeld, its unit, its Makefile or its tests use does not count as mistyped, nor what Kubernetes
    adds beside a Service named reeld."""
    used = {"REELD_SERVICE_HOST", "REELD_SERVICE_PORT_AMQP", "REELD_PORT", "REELD_BROKER_PORT_5672_TCP_ADDR"}
    for path in [*(ROOT / "systemd").glob("*.service"), ROOT / "Makefile"]:
        used |= set(re.findall(r"REELD_[A-Z][A-Z_]*", path.read_text()))
    for package in ("daemon", "ops", "parallel", "tests"):
        for path in (ROOT / package).rglob("*.py"):
            reads = r"(?:environ(?:\.get\(|\[)|[A-Z]_VARIABLE = |envvar=)\"(REELD_[A-Z_]+)"
            used |= set(re.findall(reads, path.read_text()))
    assert used >= {"REELD_CONFIG", "REELD_LAUNCHER", "REELD_INSTANCE", "REELD_EVERY_TASK", "REELD_TEST_BROKER_ROOT"}
    settings = {"REELD_AMQP_URL": "amqp://host", "REELD_POOL": "p", "REELD_BROKER__PREFIX": "p"}
    for name in used:
        monkeypatch.setenv(name, settings.get(name, "1"))
    load(file, LEAST)


def test_a_variable_that_must_be_json_and_is_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that is not JSON is a configuration error too, and not a traceback; it is not repeated."""
    monkeypatch.setenv("REELD_MODELS", "tiny-t2v")
    monkeypatch.setenv("REELD_INPUTS__SCHEMES", "file")
    monkeypatch.setenv("REELD_BROKER", "amqp://u:hunter2@host")
    said = "must be JSON, like every variable for a list or a whole section"
    variables = ("REELD_BROKER", "REELD_INPUTS__SCHEMES", "REELD_MODELS")
    assert faults(None).splitlines() == [f"{variable}: {said}" for variable in variables]


def test_reeld_amqp_url_is_short_for_the_brokers_url(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """REELD_AMQP_URL beats the file, and the long name beats it, unless that is empty."""
    text = LEAST + '[broker]\nurl = "amqp://file"\nprefix = "kept"\n'
    monkeypatch.setenv("REELD_AMQP_URL", "amqps://short")
    config = load(file, text)
    assert (config.broker.url, config.broker.prefix) == ("amqps://short", "kept")
    monkeypatch.setenv("REELD_BROKER__URL", "")
    assert load(file, text).broker.url == "amqps://short"
    monkeypatch.setenv("REELD_BROKER__URL", "amqp://long")
    assert load(file, text).broker.url == "amqp://long"


def test_url_file_wins_over_url(file: Path, tmp_path: Path) -> None:
    """A credential's file holds the URL, with or without a newline."""
    secret = tmp_path / "url"
    secret.write_text("amqps://u:p@host/v\n")
    config = load(file, LEAST + f'[broker]\nurl_file = "{secret}"\n')
    assert config.broker.resolved_url() == "amqps://u:p@host/v"


def test_a_url_of_the_environment_beats_the_files_url_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a variable says wins over the file and over a credential, even where these say it in a file of their own."""
    for name in ("url", "other", "broker-url"):
        (tmp_path / name).write_text(f"amqp://in-{name}")
    text = LEAST + f'[broker]\nurl_file = "{tmp_path}/url"\nca_file = "/kept"\n'
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert load(file, text).broker.resolved_url() == "amqp://in-url"
    for variable, value in (
        ("REELD_AMQP_URL", "amqp://in-short"),
        ("REELD_BROKER__URL", "amqp://in-long"),
        ("REELD_BROKER", '{"url": "amqp://in-json"}'),
    ):
        with monkeypatch.context() as during:
            during.setenv(variable, value)
            for text_ in (text, LEAST):
                assert load(file, text_).broker.resolved_url().removeprefix("amqp://in-") in value
            assert load(file, text).broker.ca_file == Path("/kept")
    monkeypatch.setenv("REELD_AMQP_URL", "amqp://in-short")
    monkeypatch.setenv("REELD_BROKER__URL_FILE", str(tmp_path / "other"))
    assert load(file, text).broker.resolved_url() == "amqp://in-other", "of two variables the file's wins, as ever"


def test_credentials_are_picked_up(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd's LoadCredential= hands over stands in for the settings; a path in the file wins, what is not there
    is left out."""
    for name in ("broker-url", "broker-ca", "broker-cert"):
        (tmp_path / name).write_text("amqps://user:secret@broker/")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    broker = load(file, LEAST + '[broker]\nca_file = "/etc/ssl/own.pem"\n').broker
    assert broker.resolved_url() == "amqps://user:secret@broker/"
    assert (broker.ca_file, broker.cert_file) == (Path("/etc/ssl/own.pem"), tmp_path / "broker-cert")
    assert broker.key_file is None
    assert load(file, LEAST).broker.ca_file == tmp_path / "broker-ca"


def test_a_credential_that_cannot_be_looked_at(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the configuration, in one line."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/" + "x" * 300)
    with pytest.raises(ConfigError, match="broker-url: File name too long"):
        load(file, LEAST)


def test_two_units_on_a_box_are_two_workers(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit's instance is part of a worker's default name."""
    alone = load(file, LEAST).worker_id
    monkeypatch.setenv("REELD_INSTANCE", "wan-14b")
    assert load(file, LEAST).worker_id == f"{alone}-wan-14b"


@pytest.mark.parametrize(
    "content", [None, b"", b"http://x:hunter2@y", b"amqp://x:hunter2/@y", b"amqp://x:hunter2@", b"\xff"]
)
def test_an_unusable_url_file_is_a_configuration_error(file: Path, tmp_path: Path, content: bytes | None) -> None:
    """Missing, empty, wrong or binary: the file is named and its content is not."""
    secret = tmp_path / "url"
    if content is not None:
        secret.write_bytes(content)
    broker = load(file, LEAST + f'[broker]\nurl_file = "{secret}"\n').broker
    with pytest.raises(ConfigError) as caught:
        broker.resolved_url()
    assert str(secret) in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("content", [b"models = [", b"a = 1\na = 2", b"\xff\xfe"])
def test_bad_toml_is_a_configuration_error(file: Path, content: bytes) -> None:
    """A file that is no TOML is named."""
    file.write_bytes(content)
    assert faults(file).startswith(f"{file}: not valid TOML")


def test_a_missing_file_is_a_configuration_error(file: Path, tmp_path: Path) -> None:
    """A file that is not there, or is a folder, is named together with the option that names it."""
    assert faults(file) == f"{file}: No such file or directory; give the path of reeld's TOML file with --config"
    assert "Is a directory" in faults(tmp_path)


def test_no_configuration_at_all_says_what_is_missing() -> None:
    """Without file and environment the file is asked for."""
    assert faults(None) == "environment: models: give reeld's TOML file with --config FILE or REELD_CONFIG"
