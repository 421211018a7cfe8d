"""The operator's commands: dead letters, draining, cancelling, watching the whole, stacks, the bundle for support.

Owns their options. Each command's work is in a module of its own, imported only when the command runs. Leaves out the
other commands (`ops.cli`).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.broker_options import BrokerChoice, takes_broker, takes_pool
from ops.options import ConfigOption

if TYPE_CHECKING:
    from ops.dlq import Filters

# `reeld@INSTANCE.service` reads INSTANCE.toml there, with REELD_INSTANCE set.
_UNITS_FOLDER = Path("/etc/reeld")

dlq_app = typer.Typer(help="List, show, requeue or drop the jobs that could not be done.", no_args_is_help=True)

CodesOption = Annotated[list[str] | None, typer.Option("--code", help="Only with this error code; repeatable.")]
JobIdsOption = Annotated[list[str] | None, typer.Option("--job-id", help="Only this job; repeatable.")]
OlderOption = Annotated[str | None, typer.Option("--older-than", metavar="AGE", help="Only older: 90s, 15m, 2h, 7d.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most so many, the oldest first.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them; needed when no filter is given.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
TimeoutOption = Annotated[float | None, typer.Option(metavar="SECONDS", help="How long --wait waits.")]


@dlq_app.command("list")
@takes_pool
def dlq_list(
    choice: BrokerChoice,
    code: CodesOption = None,
    job_id: JobIdsOption = None,
    older_than: OlderOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """List a pool's dead letters, oldest first. They stay where they are.

    Examples:

        reeld dlq list --pool wan2.1-t2v-1.3b

        reeld dlq list --config /etc/reeld/reeld.toml --code out_of_memory --older-than 2h --json
    """
    from ops import dlq

    dlq.list_letters(choice.broker(), choice.pool(), _filters(code, job_id, older_than, limit), as_json=as_json)


@dlq_app.command("show")
@takes_pool
def dlq_show(
    choice: BrokerChoice,
    code: CodesOption = None,
    job_id: JobIdsOption = None,
    older_than: OlderOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show dead letters in full: the reason, the headers and the job. They stay where they are.

    Examples:

        reeld dlq show --pool wan2.1-t2v-1.3b --job-id fox-1

        reeld dlq show --pool wan2.1-t2v-1.3b --limit 1 --json | jq '.[0].body'
    """
    from ops import dlq

    dlq.show_letters(choice.broker(), choice.pool(), _filters(code, job_id, older_than, limit), as_json=as_json)


@dlq_app.command("requeue")
@takes_pool
def dlq_requeue(
    choice: BrokerChoice,
    code: CodesOption = None,
    job_id: JobIdsOption = None,
    older_than: OlderOption = None,
    limit: LimitOption = None,
    every: AllOption = False,
    yes: YesOption = False,
) -> None:
    """Send jobs back to their pool, as on their first attempt; the reason they were here for goes along in a header.

    Each is published and confirmed before its dead letter is acked. Ends with 1 when none matches.

    Examples:

        reeld dlq requeue --pool wan2.1-t2v-1.3b --job-id fox-1

        reeld dlq requeue --pool wan2.1-t2v-1.3b --code storage_unavailable --yes
    """
    from ops import dlq

    dlq.requeue(choice.broker(), choice.pool(), _meant(_filters(code, job_id, older_than, limit), every=every), yes=yes)


@dlq_app.command("drop")
@takes_pool
def dlq_drop(
    choice: BrokerChoice,
    code: CodesOption = None,
    job_id: JobIdsOption = None,
    older_than: OlderOption = None,
    limit: LimitOption = None,
    every: AllOption = False,
    yes: YesOption = False,
) -> None:
    """Drop dead letters for good. Ends with 1 when none matches.

    Examples:

        reeld dlq drop --pool wan2.1-t2v-1.3b --code malformed_job --older-than 7d

        reeld dlq drop --pool wan2.1-t2v-1.3b --all --yes
    """
    from ops import dlq

    dlq.drop(choice.broker(), choice.pool(), _meant(_filters(code, job_id, older_than, limit), every=every), yes=yes)


@takes_broker
def top(
    choice: BrokerChoice,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, when all had the time to be heard.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: as JSON.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="With --once: also as a picture.")] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="With --once: how long to wait for the first worker.")
    ] = None,
) -> None:
    """Show all workers, their ranks, the jobs and the queues on a live screen. q or Ctrl-C leaves it.

    Without a terminal it prints lines. Ends with 1 when --once hears nobody.

    Examples:

        reeld top

        reeld top --once --json | jq '.workers[] | select(.silent) | .worker_id'
    """
    from ops import top as command
    from ops.failure import UsageError

    if not once and (as_json or svg or timeout):
        raise UsageError("--json, --svg and --timeout go with --once")
    broker = choice.broker()
    if once:
        command.once(broker, as_json=as_json, svg=svg, timeout_seconds=timeout)
    else:
        command.live(broker)


@takes_broker
def drain(
    choice: BrokerChoice,
    worker: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORKER...",
            help="worker_id, as `top` shows; of a unit HOST-INSTANCE by default. Without one, that of --config.",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every worker that is heard.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Until they have stopped.")] = False,
    timeout: TimeoutOption = None,
) -> None:
    """Ask workers to finish the job in hand and stop, over the broker. They end with 0, and stay stopped.

    Prints who answered. Ends with 1 when one does not listen or does not answer.

    Examples:

        reeld drain box-7-wan --wait

        reeld drain --all --wait --timeout 1800
    """
    from ops import drain as command
    from ops.failure import UsageError

    names = list(worker or ())
    if choice.config is not None and not names and not every:
        names = [_worker_of(choice.config)]
    if bool(names) == every:
        raise UsageError("name the workers (`reeld top --once` lists them), or give --all")
    broker = choice.broker()
    command.drain(broker, list(dict.fromkeys(names)), every=every, wait=wait, timeout_seconds=timeout)


@takes_broker
def cancel(
    choice: BrokerChoice,
    job_id: Annotated[str, typer.Argument(metavar="JOB_ID", help="As `submit` printed it, and `top` shows it.")],
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Until the job has ended.")] = False,
    timeout: TimeoutOption = None,
) -> None:
    """End a job, running or queued, of any pool. It is no dead letter; its publisher hears `cancelled`.

    Prints each worker's answer: running (it stops at its next step), finishing or succeeded (too late), unknown (not
    there; it will not start there). Ends with 1 when nobody listens or answers, and with --wait when it came too late.

    Examples:

        reeld cancel 0198f0c2-7a51-7c3e-9a55-5f1f4b7a2f10

        reeld cancel fox-1 --wait --timeout 60
    """
    from ops import cancel as command

    broker = choice.broker()
    command.cancel(broker, job_id, wait=wait, timeout_seconds=timeout)


def stacks(
    name: Annotated[
        str | None,
        typer.Argument(metavar="DAEMON", help="A pid, a unit or instance, or a configuration's name; else all."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the Python stacks of all ranks, and of the launcher, of a daemon on this box. It goes on meanwhile.

    Also answers for a rank that hangs inside a library. Needs the daemon's user, or root.

    Examples:

        sudo reeld stacks

        sudo reeld stacks wan-14b --json
    """
    from ops import stacks as command

    command.stacks(name, as_json=as_json)


def support_bundle(
    config: ConfigOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")] = None,
    since: Annotated[str, typer.Option(help="How far back the journal goes, as journalctl has it.")] = "-2h",
    torch: Annotated[bool, typer.Option("--torch", help="Also ask torch for GPUs, NCCL and kernels (slow).")] = False,
) -> None:
    """Gather what is needed to understand a fault into a .tar.gz, with passwords and other secrets removed.

    Nothing is sent anywhere. As root it has the stacks and the journal as well.

    Example:

        sudo reeld support-bundle --config /etc/reeld/reeld.toml
    """
    from ops import support_bundle as command
    from ops.failure import CommandFailedError

    try:
        path = command.support_bundle(config, output, since=since, with_torch=torch)
    except OSError as error:
        raise CommandFailedError(f"{error.filename}: {error.strerror}") from error
    typer.echo(path)


def add_to(app: typer.Typer) -> None:
    """Adds these commands to `reeld`."""
    app.command()(top)
    app.command()(drain)
    app.command()(cancel)
    app.command()(stacks)
    app.command()(support_bundle)
    app.add_typer(dlq_app, name="dlq")


def _worker_of(config: Path) -> str:
    """The worker that runs a configuration. One in /etc/reeld is a unit's, whose name has the instance in it."""
    from daemon.config import load_config

    settings = load_config(config)
    named = "worker_id" in settings.model_fields_set or "REELD_INSTANCE" in os.environ
    if named or config.absolute().parent != _UNITS_FOLDER:
        return settings.worker_id
    return f"{settings.worker_id}-{config.stem}"


def _filters(
    codes: list[str] | None, job_ids: list[str] | None, older_than: str | None, limit: int | None
) -> "Filters":
    from ops.dlq import Filters, seconds_of

    return Filters(
        codes=tuple(codes or ()),
        job_ids=tuple(job_ids or ()),
        older_than_seconds=seconds_of(older_than),
        limit=limit,
    )


def _meant(filters: "Filters", *, every: bool) -> "Filters":
    from ops.failure import UsageError

    if not every and not filters.given:
        raise UsageError("say which: --code, --job-id, --older-than or --limit; or --all")
    return filters
