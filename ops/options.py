"""Options that several commands of `reeld` share; those that say where the broker is are in `ops.broker_options`."""

from pathlib import Path
from typing import Annotated

import typer

PrefixOption = Annotated[str, typer.Option(envvar="REELD_BROKER__PREFIX", help="Prefix of exchanges and queues.")]
ConfigOption = Annotated[
    Path | None,
    # `load_config` says whether it can be read, and ends with another status than wrong usage.
    typer.Option(
        "--config", "-c", envvar="REELD_CONFIG", help="reeld's TOML file.", show_default=False, readable=False
    ),
]
