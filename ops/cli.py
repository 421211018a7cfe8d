"""The `reeld` command: its sub-commands, their options, and how an error ends the process.

Owns the command line. Each command's work is in a module of its own, imported only when the command runs, so
that `reeld --help` answers at once. Leaves out everything that a command does.
"""

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ops import commands_bench, commands_operator, commands_service
from ops.broker_options import BrokerChoice, takes_broker, takes_pool
from ops.options import ConfigOption, PrefixOption

EPILOG = """
Exit statuses: 0 all went well; 1 something failed; 2 wrong usage; 3 the job failed or was cancelled;
75 the broker is unavailable, try later; 77 the broker refused the credentials;
78 the configuration, a model folder or the topology is wrong.
"""

app = typer.Typer(
    name="reeld",
    help="A video-generation worker: jobs from RabbitMQ, DiffSynth's Wan pipelines on all the GPUs of a box.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
topology_app = typer.Typer(help="Plan, apply or check what the broker needs.", no_args_is_help=True)
app.add_typer(topology_app, name="topology")
app.add_typer(commands_bench.app, name="bench")


class SchemaName(StrEnum):
    """What `reeld schema` prints."""

    JOB = "job"
    CONFIG = "config"
    ASYNCAPI = "asyncapi"


@app.command()
def run(
    config: ConfigOption = None,
    check: Annotated[bool, typer.Option("--check", help="Validate configuration and model folders, and stop.")] = False,
) -> None:
    """Run the worker in the foreground, as systemd does. SIGTERM finishes the current job and ends with 0.

    Examples:

        reeld run --config /etc/reeld/reeld.toml

        reeld run --config /etc/reeld/reeld.toml --check
    """
    from daemon.config import load_config

    settings = load_config(config)
    if not check:
        from daemon import launcher

        raise typer.Exit(launcher.run(settings, config))
    from daemon import validation

    validation.check(settings)
    for model in settings.models:
        typer.echo(f"model {model.profile}: {model.path} is whole")
    typer.echo("configuration is valid")


@app.command()
@takes_pool
def submit(
    choice: BrokerChoice,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", metavar="JOB.json", help="A job as JSON, - for stdin; other options win over it."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="text_to_video or image_to_video; by default as --image says.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to show.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    image: Annotated[
        str | None,
        typer.Option(
            help="First frame: a URI, or a file that is on this box and, by the same path, on the worker's, whose "
            "inputs.schemes must allow file and inputs.roots its folder."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random without it; the result names the one used.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames; rounded up to 4n+1.")] = None,
    steps: Annotated[int | None, typer.Option(help="num_inference_steps.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="1 switches guidance off.")] = None,
    sigma_shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second of the video file.")] = None,
    job_id: Annotated[str | None, typer.Option(help="Generated when absent; one id, one video.")] = None,
    time_limit: Annotated[float | None, typer.Option(metavar="SECONDS", help="The job's own time limit.")] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show progress and print the result.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long --wait waits; the job goes on afterwards."),
    ] = None,
    validate: Annotated[bool, typer.Option(help="Check the job before publishing it.")] = True,
) -> None:
    """Publish a job; persistent, and confirmed by the broker. Prints its id.

    What is left out takes the default of the worker's model profile.

    Examples:

        reeld submit --pool wan2.1-t2v-1.3b --prompt "a red fox runs through snow" --seed 7 --wait

        reeld submit --pool wan2.1-i2v-14b-480p --image https://example.org/fox.png --prompt "it turns"

        reeld submit --pool wan2.1-t2v-1.3b --file job.json
    """
    from ops import submission
    from ops.failure import UsageError

    pool = choice.pool()
    base = {} if file is None else submission.read_document(file)
    if file is None and prompt is None:
        raise UsageError("give --prompt, or a whole job with --file")
    if task is None and "task" not in base:
        task = "text_to_video" if image is None else "image_to_video"
    document = submission.build_document(
        base,
        {
            "job_id": job_id,
            "task": task,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "inputs.input_image": None if image is None else submission.image_uri(image),
            "parameters.seed": seed,
            "parameters.height": height,
            "parameters.width": width,
            "parameters.num_frames": num_frames,
            "parameters.num_inference_steps": steps,
            "parameters.cfg_scale": cfg_scale,
            "parameters.sigma_shift": sigma_shift,
            "output.fps": fps,
            "time_limit_seconds": time_limit,
        },
    )
    broker = choice.broker()
    submission.submit(broker, pool, document, validate=validate, wait=wait, timeout_seconds=timeout)


@app.command()
@takes_broker
def watch(
    choice: BrokerChoice,
    job: Annotated[str | None, typer.Option(metavar="ID", help="Only this job's events.")] = None,
    worker: Annotated[bool, typer.Option("--worker", help="Only the workers' events, heartbeats included.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The events as they are, one JSON object a line.")] = False,
) -> None:
    """Follow events until Ctrl-C. Reconnects when the broker goes away.

    Examples:

        reeld watch

        reeld watch --job 0198f0c2-7a51-7c3e-9a55-5f1f4b7a2f10

        reeld watch --worker --json | jq .data.ranks
    """
    from ops import watch as command

    broker = choice.broker()
    command.watch(broker, command.routing_keys(job, worker=worker), as_json=as_json)


@topology_app.command("plan")
def topology_plan(config: ConfigOption = None) -> None:
    """Print every exchange, queue and binding that the configuration asks for. Needs no broker.

    Example:

        reeld topology plan --config /etc/reeld/reeld.toml
    """
    from ops import topology

    topology.plan(config)


@topology_app.command("apply")
def topology_apply(config: ConfigOption = None) -> None:
    """Declare what is missing on the broker; never changes or deletes what is there.

    Ends with 78 when something exists already but differently.

    Example:

        reeld topology apply --config /etc/reeld/reeld.toml
    """
    from ops import topology

    topology.apply(config)


@topology_app.command("check")
def topology_check(config: ConfigOption = None) -> None:
    """Print how the broker differs from the plan; creates nothing. Ends with 78 if anything differs.

    Example:

        reeld topology check --config /etc/reeld/reeld.toml
    """
    from ops import topology

    topology.check(config)


@app.command()
def plan(
    config: ConfigOption = None,
    profile: Annotated[str | None, typer.Option(help="A profile's name or file, or one of --config's models.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Its folder; without one torch is needed (slow).")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, max=64, help="Default: as configured, else 1.")] = None,
    memory: Annotated[str | None, typer.Option(help="resident, encoder_offload, fsdp or vram_limit.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="1: one branch only.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Say whether it fits; by default into memory_limit_gib.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes, as JSON.")] = False,
) -> None:
    """Print the memory that a job would take on each rank, part by part, before anything loads.

    What neither an option nor the configuration says is named as assumed. Ends with 1 when it does not fit.

    Examples:

        reeld plan --config /etc/reeld/reeld.toml --ranks 2 --gpu-memory 80 --num-frames 121

        reeld plan --profile wan2.1-t2v-14b --ranks 2 --memory fsdp --gpu-memory 80
    """
    from ops import memory_plan as command

    found = command.plan(
        command.asked(
            config,
            profile=profile,
            folder=folder,
            ranks=ranks,
            memory=memory,
            height=height,
            width=width,
            num_frames=num_frames,
            cfg_scale=cfg_scale,
            dtype=dtype,
            gpu_memory_gib=gpu_memory,
        )
    )
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo("\n".join(command.table(found)))
    if not found.get("fits", True):
        raise typer.Exit(1)


@app.command("tiny-model")
def tiny_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write the model folders into.")],
) -> None:
    """Write the tiny Wan models, one for each task: real layouts, random weights, some MB each.

    Example:

        reeld tiny-model /tmp/tiny
    """
    from ops import tiny_model as command

    for path in command.write(directory):
        typer.echo(path)


@app.command()
def doctor(
    config: ConfigOption = None,
    torch: Annotated[bool, typer.Option("--torch", help="Also start torch and list the GPUs it sees (slow).")] = False,
) -> None:
    """Check everything the worker needs, and say how to mend what is wrong. Ends with 1 when something is.

    Example:

        reeld doctor --config /etc/reeld/reeld.toml --torch
    """
    from ops import doctor as command

    if not command.doctor(config, with_torch=torch):
        raise typer.Exit(1)


@app.command()
def health(
    config: ConfigOption = None,
    url: Annotated[
        str | None, typer.Option("--url", help="The endpoint; by default metrics.listen.", show_default=False)
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Ask only whether any rank hangs.")] = False,
) -> None:
    """Ask a running worker whether it can take a job. Ends with 1, and the reasons, when it cannot.

    Examples:

        reeld health --config /etc/reeld/reeld.toml

        reeld health --live --url http://127.0.0.1:9464
    """
    from ops import health as command

    reasons = command.health(command.base_url(url, config), live=live)
    typer.echo("\n".join(reasons) if reasons else ("live" if live else "ready"))
    if reasons:
        raise typer.Exit(1)


@app.command()
def schema(
    what: Annotated[
        SchemaName, typer.Argument(help="The job message, the configuration, or all that goes over the broker.")
    ] = SchemaName.JOB,
    prefix: PrefixOption = "reeld",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Of config: as the reference in docs/configuration.md.")
    ] = False,
) -> None:
    """Print the JSON Schema of a job or of the configuration, or an AsyncAPI 3.0 document of the broker's side.

    Examples:

        reeld schema job > job.schema.json

        reeld schema config --markdown > docs/configuration.md

        reeld schema asyncapi > asyncapi.json
    """
    import json

    from daemon.job import job_json_schema
    from ops.asyncapi import asyncapi_document
    from ops.config_reference import config_json_schema, config_markdown
    from ops.failure import UsageError

    if markdown and what is not SchemaName.CONFIG:
        raise UsageError("--markdown goes with `reeld schema config`")
    match what:
        case SchemaName.CONFIG if markdown:
            typer.echo(config_markdown())
            return
        case SchemaName.CONFIG:
            document = config_json_schema()
        case SchemaName.JOB:
            document = job_json_schema()
        case SchemaName.ASYNCAPI:
            document = asyncapi_document(prefix=prefix)
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


commands_service.add_to(app)


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--directory", "-d", help="Where everything goes.")] = Path("demo-output"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave broker and worker running until Ctrl-C.")] = False,
) -> None:
    """Show the whole path with a tiny model, a private broker and two ranks; needs no GPU.

    A text-to-video job, an image-to-video job and a malformed one are published; every outcome is checked.
    With REELD_AMQP_URL set that broker is used, under names of the demo's own that are deleted again.

    Examples:

        reeld demo

        reeld demo --keep
    """
    from ops import demo as command

    command.demo(directory, keep=keep)


commands_operator.add_to(app)


def main() -> NoReturn:
    """The entry point: runs a command and ends the process with its status."""
    from ops.failure import report

    # pika also logs what it raises; without a handler Python would print that.
    logging.getLogger("pika").addHandler(logging.NullHandler())
    try:
        app(standalone_mode=True)
    except Exception as error:  # noqa: BLE001 - the one broad catch of the command: `report` raises what it does not know
        sys.exit(report(error))
    sys.exit(0)


if __name__ == "__main__":
    main()
