"""Where a command finds its broker: options, variables, a configuration, and which of them wins."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from daemon.errors import BrokerUnavailableError, ConfigError
from daemon.sections import BrokerConfig
from ops.broker_options import DEFAULT_URL, BrokerChoice, takes_broker, takes_pool
from ops.cli import app
from ops.failure import UsageError


def told(*arguments: str, variables: dict[str, str] | None = None) -> BrokerChoice:
    """What a command gets that has a parameter of its own besides."""
    found = []
    own = typer.Typer()

    @own.command()
    @takes_pool
    def command(choice: BrokerChoice, name: str = "nobody") -> None:
        assert name == "somebody"
        found.append(choice)

    result = CliRunner().invoke(own, ["--name", "somebody", *arguments], env=variables, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("REELD_AMQP_URL", "REELD_BROKER__URL_FILE", "REELD_BROKER__PREFIX", "REELD_POOL", "REELD_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "url").write_text("amqp://a:b@from-file/")
    (tmp_path / "reeld.toml").write_text(
        f'''pool = "configured"
[[models]]
path = "/models/wan"
profile = "wan2.1-t2v-1.3b"
[broker]
url_file = "{tmp_path}/url"
ca_file = "/configured"
prefix = "configured"
confirm_timeout_seconds = 7
'''
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "variables", "url"),
    [
        ("", {}, DEFAULT_URL),
        ("--url amqp://a:b@typed/", {"REELD_AMQP_URL": "amqp://a:b@said/"}, "amqp://a:b@typed/"),
        ("--url amqp://a:b@typed/", {"REELD_BROKER__URL_FILE": "url"}, "amqp://a:b@typed/"),
        ("--url-file url", {"REELD_AMQP_URL": "amqp://a:b@said/"}, "amqp://a:b@from-file/"),
        ("", {"REELD_AMQP_URL": "amqp://a:b@said/", "REELD_BROKER__URL_FILE": "url"}, "amqp://a:b@from-file/"),
        ("--config reeld.toml", {}, "amqp://a:b@from-file/"),
        ("--config reeld.toml", {"REELD_AMQP_URL": "amqp://a:b@said/"}, "amqp://a:b@said/"),
        ("--config reeld.toml --url amqp://a:b@typed/", {}, "amqp://a:b@typed/"),
        ("--config reeld.toml --url-file url", {"REELD_AMQP_URL": "amqp://a:b@said/"}, "amqp://a:b@from-file/"),
    ],
)
def test_what_is_typed_wins_over_variables_and_these_over_the_configuration(
    arguments: str, variables: dict[str, str], url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert told(*arguments.split()).broker().resolved_url() == url


def test_a_configuration_says_what_no_option_says(folder: Path) -> None:
    choice = told("--config", "reeld.toml", "--ca-file", "/typed", "--prefix", "reeld")
    assert choice.broker() == BrokerConfig(
        url_file=folder / "url", ca_file=Path("/typed"), prefix="reeld", confirm_timeout_seconds=7
    )
    assert choice.pool() == "configured"
    assert told("--config", "reeld.toml", "--pool", "typed").pool() == "typed"
    assert told(variables={"REELD_POOL": "said"}).pool() == "said"


def test_what_cannot_be_used_is_wrong_usage_or_a_wrong_configuration(folder: Path) -> None:
    with pytest.raises(UsageError, match="--pool, REELD_POOL or --config"):
        told().pool()
    with pytest.raises(UsageError, match="not both"):
        told("--url", "amqp://a:b@typed/", "--url-file", "url").broker()
    with pytest.raises(UsageError, match=r"^--url: .*amqp://"):
        told("--config", "reeld.toml", "--url", "http://a:b@typed/").broker()
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        told("--config", "nowhere.toml").broker()


@pytest.mark.parametrize(
    ("arguments", "hinted"),
    [
        ("", True),
        (f"--url {DEFAULT_URL}", True),
        ("--url amqp://a:b@127.0.0.1/", False),
        ("--url-file url", False),
        ("--config reeld.toml", False),
    ],
)
def test_who_gave_no_url_is_told_which_one_was_taken(arguments: str, hinted: bool, folder: Path) -> None:
    """Nobody listens at the default, and the error says that it is the default; any other error is as it was."""
    own = typer.Typer()

    @own.command()
    @takes_broker
    def command(_choice: BrokerChoice) -> None:
        raise BrokerUnavailableError("refused")

    error = CliRunner().invoke(own, arguments.split()).exception
    assert isinstance(error, BrokerUnavailableError)
    first, *rest = str(error).splitlines()
    assert first == "refused"
    assert bool(rest) == hinted
    assert all("REELD_AMQP_URL" in text for text in rest)


def test_every_command_that_speaks_to_a_broker_takes_a_configuration() -> None:
    found = [each for each in commands() if "url_file" in inspect.signature(each).parameters]
    assert len(found) == 9
    assert all({"url", "config", "prefix"} <= set(inspect.signature(each).parameters) for each in found)


def commands() -> list[Callable[..., object]]:
    """The functions behind `reeld`'s commands and those of its groups."""
    groups = [app, *(each.typer_instance for each in app.registered_groups)]
    registered = [each.callback for group in groups if group is not None for each in group.registered_commands]
    return [each for each in registered if each is not None]
