"""How jobs are watched: a live bar on a terminal, plain lines elsewhere, and events as lines of text.

Owns every rendering of events for people. Leaves out where the events come from (`daemon.client`).
"""

import time
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from daemon.client import ReceivedEvent

_SECONDS_BETWEEN_LINES = 1.0


class JobDisplay(Protocol):
    """Shows how jobs are getting on, from `add` to their terminal event."""

    def add(self, job_id: str, label: str) -> None: ...
    def show(self, event: ReceivedEvent) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def job_display(console: Console) -> JobDisplay:
    """A live bar a job on a terminal, a line an event elsewhere."""
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


class LiveDisplay:
    """A bar a job, drawn over itself."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[label]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[steps]:>5}"),
            TextColumn("{task.description}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def add(self, job_id: str, label: str) -> None:
        self._tasks[job_id] = self._progress.add_task("queued", total=None, label=escape(label), steps="")

    def show(self, event: ReceivedEvent) -> None:
        task = self._tasks.get(str(event.data.get("job_id")))
        if task is None or not event.is_job:
            return
        text = escape(describe(event))
        match event.name:
            case "progress":
                step, steps = event.data.get("step"), event.data.get("steps")
                if _is_count(step) and _is_count(steps) and steps:
                    self._progress.update(task, completed=step, total=steps, steps=f"{step}/{steps}")
                self._progress.update(task, description=escape(progress_text(event.data, with_steps=False)))
            case "succeeded":
                total = self._progress.tasks[task].total or 1
                steps = f"{total:.0f}/{total:.0f}" if total > 1 else ""
                self._progress.update(task, completed=total, total=total, steps=steps, description="[green]done[/]")
                self._progress.stop_task(task)
            case "failed" | "cancelled":
                # The whole message comes afterwards; here it would push the other bars out of line.
                short = " ".join(str(word) for word in (event.name, event.data.get("code")) if word)
                self._progress.update(task, total=1, completed=1, steps="", description=f"[red]{escape(short)}[/]")
                self._progress.stop_task(task)
            case _:
                self._progress.update(task, description=text)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class LineDisplay:
    """A line an event, for pipes and logs; progress at most once a second and at each new phase."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._labels: dict[str, str] = {}
        self._last: dict[str, tuple[str, float]] = {}

    def add(self, job_id: str, label: str) -> None:
        self._labels[job_id] = label

    def show(self, event: ReceivedEvent) -> None:
        job_id = str(event.data.get("job_id"))
        label = self._labels.get(job_id)
        if label is None or not event.is_job:
            return
        if event.name == "progress":
            phase, now = str(event.data.get("phase")), time.monotonic()
            last_phase, last = self._last.get(job_id, ("", 0.0))
            if phase == last_phase and now - last < _SECONDS_BETWEEN_LINES:
                return
            self._last[job_id] = (phase, now)
        self._console.print(f"{label}: {describe(event)}", markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def describe(event: ReceivedEvent) -> str:
    """What an event says, in one line, without its subject."""
    data = event.data
    match event.name:
        case "progress":
            return progress_text(data)
        case "started" if event.is_job:
            return f"started on {data.get('worker_id')}, {data.get('world_size', 1)} rank(s)"
        case "retrying":
            return f"retrying in {_number(data.get('delay_seconds'))} s: {failure_text(data)}"
        case "succeeded":
            video = _mapping(_mapping(data.get("result")).get("video"))
            return f"succeeded: {video.get('uri') or video.get('path')}"
        case "failed":
            return f"failed: {failure_text(data)}"
        case "heartbeat":
            return heartbeat_text(data)
        case _:
            extra = {key: value for key, value in data.items() if key in ("attempt", "reason", "state", "pool")}
            return " ".join([event.name, *(f"{key}={value}" for key, value in extra.items())])


def progress_text(data: dict[str, Any], *, with_steps: bool = True) -> str:
    """`denoising 3/8, 0.41 s/step, 2 s left`; what is not known is left out."""
    phase = str(data.get("phase") or "working").replace("_", " ")
    step, steps = data.get("step"), data.get("steps")
    words = [f"{phase} {step}/{steps}" if with_steps and _is_count(step) and _is_count(steps) else phase]
    if (pace := _number(data.get("seconds_per_step"))) is not None:
        words.append(f"{pace} s/step")
    if (eta := _number(data.get("eta_seconds"))) is not None:
        words.append(f"{eta} s left")
    return ", ".join(words)


def failure_text(data: dict[str, Any]) -> str:
    """`code (path): message`, in one line."""
    where = f" ({data['path']})" if data.get("path") else ""
    return " ".join(f"{data.get('code')}{where}: {data.get('message')}".split())


def heartbeat_text(data: dict[str, Any]) -> str:
    """`idle, 2 ranks: 0 idle, 1 idle`."""
    ranks = data.get("ranks")
    parts = []
    for rank in ranks if isinstance(ranks, list) else []:
        if isinstance(rank, dict):
            step = f" {rank['step']}/{rank.get('steps')}" if _is_count(rank.get("step")) and rank.get("steps") else ""
            used = rank.get("memory_used_bytes")
            memory = f" {used / 2**30:.1f} GiB" if isinstance(used, int | float) and used else ""
            parts.append(f"{rank.get('rank')} {rank.get('phase') or rank.get('state')}{step}{memory}")
    job = f" job {data['job_id']}" if data.get("job_id") else ""
    return f"{data.get('state')}{job}; ranks: {', '.join(parts) or 'none'}"


def result_lines(data: dict[str, Any]) -> list[str]:
    """A succeeded event's result as lines of `name  value`."""
    result = _mapping(data.get("result"))
    video, timings, plan = (_mapping(result.get(key)) for key in ("video", "timings", "plan"))
    seconds = ", ".join(
        f"{name.removesuffix('_seconds').replace('_', ' ')} {_number(value)} s" for name, value in timings.items()
    )
    rows = {
        "video": video.get("uri") or video.get("path"),
        "sha256": video.get("sha256"),
        "frames": f"{video.get('num_frames')} at {_number(video.get('fps'))} a second",
        "size": f"{video.get('width')}x{video.get('height')} {video.get('codec')}, {video.get('bytes')} bytes",
        "seed": plan.get("seed"),
        "seconds": seconds,
        "manifest": result.get("manifest"),
    }
    return [f"{name:<9} {value}" for name, value in rows.items() if value not in (None, "")]


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> str | None:
    """Three significant digits at most, whole numbers as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
