"""The options by which a command finds its broker, its pool and its configuration, and what they say together.

Owns these options, their variables, and what wins: what is typed, then a variable, then the configuration's file.
Leaves out the commands, which take a `BrokerChoice` instead of options (`ops.cli`, `ops.commands_operator`).
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec

import typer

from ops.options import PrefixOption

if TYPE_CHECKING:
    from daemon.config import Config
    from daemon.sections import BrokerConfig

DEFAULT_URL = "amqp://guest:guest@127.0.0.1:5672/%2F"

_P = ParamSpec("_P")


@dataclass(frozen=True)
class BrokerChoice:
    """What a command was told: by options or their variables, and maybe by a configuration."""

    options: dict[str, Any]
    """By the names of the configuration's section."""
    typed: Collection[str]
    """Which of them stood on the command line itself."""
    pool_option: str | None
    config: Path | None

    def broker(self) -> "BrokerConfig":
        """Where the broker is. Raises UsageError, and ConfigError for the configuration or the file with the URL."""
        import pydantic

        from daemon.sections import BrokerConfig
        from ops.failure import UsageError

        if {"url", "url_file"} <= set(self.typed):
            raise UsageError("give --url or --url-file, not both")
        if self._configured is None:
            said = dict(self.options)
        else:
            said = {**dict(self._configured.broker), **{name: self.options[name] for name in self.typed}}
        if "url" in self.typed:
            said["url_file"] = None
        try:
            broker = BrokerConfig(**said)
        except pydantic.ValidationError as error:
            faults = error.errors(include_url=False, include_input=False)
            raise UsageError("\n".join(f"--{fault['loc'][0]}: {fault['msg']}" for fault in faults)) from error
        broker.resolved_url()
        return broker

    def pool(self) -> str:
        """The name of the pool. Raises UsageError when nothing says it, and ConfigError."""
        from ops.failure import UsageError

        if self.pool_option is not None:
            return self.pool_option
        if self._configured is None:
            raise UsageError("give the worker's pool with --pool, REELD_POOL or --config")
        return self._configured.pool_name

    @cached_property
    def _configured(self) -> "Config | None":
        from daemon.config import load_config

        return None if self.config is None else load_config(self.config)

    @property
    def is_default(self) -> bool:
        """Whether nobody said where the broker is."""
        return self.config is None and self.options["url_file"] is None and self.options["url"] == DEFAULT_URL


def _option(kind: Any, name: str, text: str, *, variable: str | None = None, default: Any = None) -> inspect.Parameter:
    declarations = (f"--{name.replace('_', '-')}", *(("-c",) if name == "config" else ()))
    info = typer.Option(*declarations, envvar=variable, help=text, show_default=default is not None, readable=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


_BROKER = (
    _option(
        str,
        "url",
        "The broker. A password is safer in the variable or a file.",
        variable="REELD_AMQP_URL",
        default=DEFAULT_URL,
    ),
    _option(Path | None, "url_file", "File with the URL.", variable="REELD_BROKER__URL_FILE"),
    _option(Path | None, "ca_file", "CA for amqps://.", variable="REELD_BROKER__CA_FILE"),
    _option(
        Path | None, "cert_file", "Our certificate, for a broker that asks for one.", variable="REELD_BROKER__CERT_FILE"
    ),
    _option(
        Path | None,
        "key_file",
        "Its private key, where --cert-file does not hold it as well.",
        variable="REELD_BROKER__KEY_FILE",
    ),
    inspect.Parameter("prefix", inspect.Parameter.KEYWORD_ONLY, default="reeld", annotation=PrefixOption),
)
_POOL = _option(str | None, "pool", "Which workers: their `pool`.", variable="REELD_POOL")
# Without a variable: where REELD_CONFIG is set for the worker, it would win over the default URL unasked.
_CONFIG = _option(Path | None, "config", "reeld's TOML file, for what is said neither here nor by a variable.")
_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


def takes_broker(command: Callable[Concatenate[BrokerChoice, _P], None]) -> Callable[..., None]:
    """Gives a command the options that say where the broker is, in place of its first parameter."""
    return _told(command, (*_BROKER, _CONFIG))


def takes_pool(command: Callable[Concatenate[BrokerChoice, _P], None]) -> Callable[..., None]:
    """Gives a command the options that say where the broker is, and --pool, in place of its first parameter."""
    return _told(command, (*_BROKER, _POOL, _CONFIG))


def _told(
    command: Callable[Concatenate[BrokerChoice, _P], None], options: tuple[inspect.Parameter, ...]
) -> Callable[..., None]:
    @wraps(command)
    def told(context: typer.Context, **values: Any) -> None:
        from daemon.errors import BrokerUnavailableError

        def is_typed(name: str) -> bool:
            source = context.get_parameter_source(name)
            return source is not None and source.name == "COMMANDLINE"

        given = {option.name: values.pop(option.name) for option in _BROKER}
        choice = BrokerChoice(given, [*filter(is_typed, given)], values.pop("pool", None), values.pop("config"))
        try:
            command(choice, **values)  # type: ignore[call-arg]  # the rest, as typer read it off the signature
        except BrokerUnavailableError as error:
            if not choice.is_default:
                raise
            hint = "that URL is the default: give --url, --url-file or REELD_AMQP_URL for another"
            raise BrokerUnavailableError(f"{error}\n{hint}") from error

    _, *own = inspect.signature(command).parameters.values()
    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    told.__signature__ = inspect.Signature([_CONTEXT, *options, *keywords])  # type: ignore[attr-defined]
    return told
