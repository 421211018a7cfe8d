"""Options that several commands of `reeld` share, and what they say together.

Owns the options' names, variables and help. Leaves out the commands (`ops.cli`, `ops.commands_operator`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from daemon.sections import BrokerConfig

DEFAULT_URL = "amqp://guest:guest@127.0.0.1:5672/%2F"

UrlOption = Annotated[
    str,
    typer.Option("--url", envvar="REELD_AMQP_URL", help="The broker. A password is safer in the variable or a file."),
]
UrlFileOption = Annotated[
    Path | None,
    typer.Option("--url-file", envvar="REELD_BROKER__URL_FILE", help="File with the URL; wins.", show_default=False),
]
CaFileOption = Annotated[
    Path | None,
    typer.Option("--ca-file", envvar="REELD_BROKER__CA_FILE", help="CA for amqps://.", show_default=False),
]
CertFileOption = Annotated[
    Path | None,
    typer.Option(
        "--cert-file",
        envvar="REELD_BROKER__CERT_FILE",
        help="Our certificate, for a broker that asks for one.",
        show_default=False,
    ),
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        envvar="REELD_BROKER__KEY_FILE",
        help="Its private key, where --cert-file does not hold it as well.",
        show_default=False,
    ),
]
PrefixOption = Annotated[str, typer.Option(envvar="REELD_BROKER__PREFIX", help="Prefix of exchanges and queues.")]
PoolOption = Annotated[
    str | None, typer.Option(envvar="REELD_POOL", help="Which workers: their `pool`.", show_default=False)
]
ConfigOption = Annotated[
    Path | None,
    # `load_config` says whether it can be read, and ends with another status than wrong usage.
    typer.Option(
        "--config", "-c", envvar="REELD_CONFIG", help="reeld's TOML file.", show_default=False, readable=False
    ),
]


class BrokerOptions(NamedTuple):
    """The options that say where the broker is, by the names of the configuration's section."""

    url: str
    url_file: Path | None
    ca_file: Path | None
    cert_file: Path | None
    key_file: Path | None
    prefix: str


def broker_of(options: BrokerOptions) -> "BrokerConfig":
    """The broker that the options name. Raises UsageError, and ConfigError for what is in the file with the URL."""
    import pydantic

    from daemon.sections import BrokerConfig
    from ops.failure import UsageError

    try:
        broker = BrokerConfig(**options._asdict())
    except pydantic.ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        raise UsageError("\n".join(f"--{fault['loc'][0]}: {fault['msg']}" for fault in faults)) from error
    broker.resolved_url()
    return broker
