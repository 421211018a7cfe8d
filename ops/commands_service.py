"""`reeld install`: the command line of laying reeld out as a service. Its work is in `ops.service_install`."""

import os
from pathlib import Path
from typing import Annotated

import typer


def install(
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A tree for an image instead of this system; nothing is started in it."),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The interpreter; not one in a home.", show_default="the system's"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Print every action, and do none.")] = False,
    uninstall: Annotated[bool, typer.Option("--uninstall", help="Drain, and remove what was installed.")] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="With --uninstall: configuration, credentials and logs as well.")
    ] = False,
) -> None:
    """Lay this checkout out as a systemd service, or bring what is installed up to it. Needs root, and does no more
    than is missing.

    An upgrade builds the new release and switches to it, then drains what runs and starts it again. Configuration in
    /etc/reeld and videos in /var/lib/reeld are never touched.

    Examples:

        sudo .venv/bin/reeld install --dry-run

        sudo .venv/bin/reeld install

        sudo reeld install --uninstall
    """
    from ops import service_install
    from ops.failure import UsageError

    os.umask(0o022)  # the unit's user reads what root makes here
    if purge and not uninstall:
        raise UsageError("--purge goes with --uninstall")
    box = service_install.Box(root=root)
    if uninstall:
        plan = service_install.plan_uninstall(box, purge=purge)
    else:
        plan = service_install.plan_install(box, python=python)
    if not service_install.carry_out(plan, dry_run=dry_run, say=typer.echo):
        typer.echo("nothing to do")


def add_to(app: typer.Typer) -> None:
    app.command()(install)
