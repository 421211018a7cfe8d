"""`reeld bench generate`: runs the benchmark on some ranks, and renders what it measured.

Owns the command that starts `parallel.bench` under torchrun, the Markdown table and the plot. Leaves out what is
measured and how (`parallel.bench`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.failure import CommandFailedError

_COLUMNS = (
    "variant", "ranks", "s a step", "s a video", "times plain", "TFLOP/s a card", "of the peak", "GiB a rank", "error",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What to run; see the options of `parallel.bench`."""

    profile: str
    model: Path | None
    ranks: int
    shapes: Sequence[str]
    steps: int
    rounds: int
    dtype: str
    device: str
    compiled: bool
    fsdp: bool
    guided: bool
    only: Sequence[str]
    directory: Path

    def command(self) -> list[str]:
        """torchrun's command line. The ranks use this interpreter's packages."""
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), "--standalone"]
        words += ["-m", "parallel.bench", "--profile", self.profile, "--shape", *self.shapes]
        words += ["--steps", str(self.steps), "--rounds", str(self.rounds)]
        words += ["--dtype", self.dtype, "--device", self.device, "--output", str(self.directory / "generate.json")]
        words += ["--model", str(self.model)] if self.model is not None else []
        words += [
            word
            for word, wanted in (
                ("--compile", self.compiled),
                ("--fsdp", self.fsdp),
                ("--no-guidance", not self.guided),
            )
            if wanted
        ]
        return [*words, "--only", *self.only] if self.only else words


def generate(benchmark: Benchmark) -> str:
    """Runs it, and leaves generate.json, generate.md and generate.svg in the directory. Returns the Markdown.

    Raises CommandFailedError when the ranks failed before anything was measured.
    """
    benchmark.directory.mkdir(parents=True, exist_ok=True)
    result = benchmark.directory / "generate.json"
    result.unlink(missing_ok=True)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // benchmark.ranks)), **os.environ}
    done = subprocess.run(benchmark.command(), env=environment, stdout=subprocess.DEVNULL, check=False)
    if not result.exists():
        raise CommandFailedError(f"the ranks ended with exit status {done.returncode}; their words are above")
    report = json.loads(result.read_text())
    text = markdown(report)
    if done.returncode:
        text += f"\nThe ranks ended with exit status {done.returncode}: this is what had been measured.\n"
    (benchmark.directory / "generate.md").write_text(text)
    _plot(report, benchmark.directory / "generate.svg")
    return text


def markdown(report: dict[str, Any]) -> str:
    """A table for each shape, with what it was measured on above it."""
    peak = report["matmul_tflops"]
    lines = [
        f"{report['profile']} ({report['weights']} weights), {report['dtype']}, {report['world_size']} rank(s) on "
        f"{report['device']}, torch {report['torch']}. Median of {report['rounds']} round(s) of {report['steps']} "
        f"step(s); matrix-product peak {peak['best']} TFLOP/s, {peak['kept_up']} kept up.",
    ]
    for shape, rows in _by_shape(report):
        height, width, num_frames = shape
        lines += ["", f"{height}x{width}, {num_frames} frames, {rows[0]['tokens']} tokens:", ""]
        lines += [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        plain = next((row["seconds_per_step"] for row in rows if row["variant"] == "diffsynth" and _ran(row)), None)
        lines += [f"| {' | '.join(_cells(row, plain))} |" for row in rows]
    return "\n".join([*lines, ""])


def _by_shape(report: dict[str, Any]) -> Iterator[tuple[tuple[int, ...], list[dict[str, Any]]]]:
    shapes = dict.fromkeys(tuple(row["shape"]) for row in report["results"])
    for shape in shapes:
        yield shape, [row for row in report["results"] if tuple(row["shape"]) == shape]


def _ran(row: dict[str, Any]) -> bool:
    return "seconds_per_step" in row


def _cells(row: dict[str, Any], plain: float | None) -> list[str]:
    name = f"**{row['variant']}** (chosen)" if row["chosen"] else row["variant"]
    if not _ran(row):
        return [name, str(row["ranks"]), row.get("failed", "not reached"), *[""] * (len(_COLUMNS) - 3)]
    error = row.get("relative_error")
    return [
        name,
        str(row["ranks"]),
        f"{row['seconds_per_step']:.3f}",
        f"{row['seconds_per_video']:.1f}",
        "" if plain is None else f"{plain / row['seconds_per_step']:.2f}",
        f"{row['tflops_per_card']:g}",
        f"{row['fraction_of_matmul_peak']:.0%}",
        f"{row['peak_memory_gib']:g}" if "peak_memory_gib" in row else "",
        "" if error is None else f"{error:.1e}",
    ]


def _plot(report: dict[str, Any], path: Path) -> None:
    """Bars of seconds a step, one panel a shape, with the rounds' spread."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # words as words, not as a path for each letter
    from matplotlib import pyplot

    panels = [(shape, [row for row in rows if _ran(row)]) for shape, rows in _by_shape(report)]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return
    height = sum(0.35 * len(rows) + 1.2 for _, rows in panels)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, height), squeeze=False, height_ratios=[len(rows) + 3 for _, rows in panels]
    )
    for axis, (shape, rows) in zip(axes[:, 0], panels, strict=True):
        seconds = [row["seconds_per_step"] for row in rows]
        spread = [
            [value - min(row["repeats"]) for value, row in zip(seconds, rows, strict=True)],
            [max(row["repeats"]) - value for value, row in zip(seconds, rows, strict=True)],
        ]
        names = [f"{row['variant']} · {row['ranks']}" for row in rows]
        colours = ["tab:gray" if name.startswith("diffsynth") else "tab:blue" for name in names]
        bars = axis.barh(names, seconds, xerr=spread, color=colours, error_kw={"elinewidth": 1, "alpha": 0.6})
        axis.bar_label(bars, fmt="%.3f", padding=6)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel("seconds a denoising step (median, lowest and highest round)")
        axis.set_title(f"{report['profile']}, {shape[0]}x{shape[1]}x{shape[2]}, {report['device']}")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
