"""`reeld bench`: the command line of the benchmarks. Their work is in `ops.bench` and `parallel.bench`."""

import re
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)


@app.command()
def generate(
    profile: Annotated[str, typer.Option(help="A profile's name or file.")] = "wan2.1-t2v-1.3b",
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Its folder; without one the weights are random.", show_default=False),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=64)] = 1,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="HxWxF", help="Height, width, frames; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps in each round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Every variant has its turn in each.")] = 3,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also with torch.compile.")] = True,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Also with the weights spread over the ranks.")] = False,
    guidance: Annotated[bool, typer.Option(help="Two branches a step, or one as with cfg_scale 1.")] = True,
    only: Annotated[list[str] | None, typer.Option(metavar="PREFIX", help="Variants by name; repeatable.")] = None,
    directory: Annotated[Path, typer.Option("--directory", "-d", help="Where the results go.")] = Path("bench-output"),
) -> None:
    """Time a denoising step: plain DiffSynth on one rank, its own USP, and ours on one rank and in every split.

    All over the same weights, taking turns. Leaves generate.json, generate.md and generate.svg.

    Examples:

        reeld bench generate --profile wan2.1-t2v-14b --ranks 2 --fsdp

        reeld bench generate --profile tiny-t2v --shape 128x192x33 --dtype float32 --device cpu --ranks 2 --no-compile
    """
    from ops import bench
    from ops.failure import UsageError

    shapes = shape or ["480x832x81"]
    for each in shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", each):
            raise UsageError(f"--shape {each}: give HEIGHTxWIDTHxFRAMES, like 480x832x81")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"--dtype {dtype}: give bfloat16, float16 or float32")
    benchmark = bench.Benchmark(
        profile=profile,
        model=model,
        ranks=ranks,
        shapes=shapes,
        steps=steps,
        rounds=rounds,
        dtype=dtype,
        device=device,
        compiled=compiled,
        fsdp=fsdp,
        guided=guidance,
        only=only or (),
        directory=directory,
    )
    typer.echo(bench.generate(benchmark))
