"""How `reeld top` looks: a frame of workers, jobs and queues, as a screen, as plain lines or as JSON.

Owns what is shown of a worker and what counts as worrying. Leaves out where it comes from (`ops.fleet`).
"""

import time
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ops.ages import age_text, size_text
from ops.fleet import Fleet, JobSeen, Worker
from ops.progress import failure_text, progress_text

_ENDED_SHOWN = 5
_SKEW_SECONDS = 2.0
_GOOD = {"idle": "green", "generating": "cyan", "finishing": "cyan", "settling": "cyan", "staging": "cyan"}

# How many messages wait for each pool, and among its dead letters; None: there is no such queue.
Depths = dict[str, dict[str, int | None]]


def frame(fleet: Fleet, depths: Depths, now: float, *, notice: str | None = None, live: bool = False) -> RenderableType:
    """One frame of the screen. `now` is the monotonic clock; `notice` is shown at the top, in red."""
    parts: list[RenderableType] = [_head(fleet, now, live=live)]
    if notice:
        parts.append(Text(notice, style="bold red"))
    parts += [_workers(fleet, now), _jobs(fleet, now)]
    if depths:
        parts.append(_queues(depths))
    return Group(*parts)


def lines(fleet: Fleet, depths: Depths, now: float, *, notice: str | None = None) -> Iterator[str]:
    """The frame in plain lines, for a pipe."""
    if notice:
        yield f"notice {notice}"
    for worker in _sorted(fleet):
        ranks = " ".join(f"{rank.get('rank')}:{_doing(rank)}" for rank in worker.ranks)
        yield f"worker {worker.worker_id} {_state(worker, now)[0]} pool={worker.heartbeat.get('pool')} ranks {ranks}"
    for job in fleet.going_on:
        yield f"job {job.job_id} {job.last} on {job.data.get('worker_id')}: {progress_text(job.data)}"
    for pool, depth in depths.items():
        yield f"queue {pool} " + " ".join(f"{name}={count}" for name, count in depth.items())


def document(fleet: Fleet, depths: Depths, now: float) -> dict[str, Any]:
    """The frame as JSON."""
    return {
        "workers": [
            {
                "worker_id": worker.worker_id,
                "silent": worker.is_silent(now),
                "heard_seconds_ago": round(worker.age_seconds(now), 3),
                "clock_ahead_seconds": round(worker.clock_ahead_seconds, 3),
                "processes": worker.processes,
                **worker.heartbeat,
            }
            for worker in _sorted(fleet)
        ],
        "jobs": [{"job_id": job.job_id, "event": job.last, **job.data} for job in [*fleet.going_on, *fleet.ended]],
        "queues": depths,
    }


def _head(fleet: Fleet, now: float, *, live: bool) -> Text:
    silent = sum(worker.is_silent(now) for worker in fleet.workers.values())
    ranks = sum(len(worker.ranks) for worker in fleet.workers.values())
    text = Text("reeld top  ", style="bold")
    text.append(time.strftime("%H:%M:%S"), style="dim")
    text.append(f"  {len(fleet.workers)} workers, {ranks} ranks, {len(fleet.going_on)} jobs going on")
    if silent:
        text.append(f"  {silent} silent", style="bold red")
    if live:
        text.append("   q quits", style="dim")
    return text


def _workers(fleet: Fleet, now: float) -> Table:
    table = Table("worker", "pool", "state", "rank", "doing", "progress age", "memory", expand=True, pad_edge=False)
    for worker in _sorted(fleet):
        state, style = _state(worker, now)
        first: list[str | Text] = [worker.worker_id, str(worker.heartbeat.get("pool", "?")), Text(state, style=style)]
        for rank in worker.ranks or [{}]:
            age = rank.get("last_progress_age_seconds")
            limit = rank.get("stall_limit_seconds")
            worrying = isinstance(age, int | float) and isinstance(limit, int | float) and age > limit / 2
            used = rank.get("memory_used_bytes")
            table.add_row(
                *first,
                str(rank.get("rank", "")),
                Text(_doing(rank), style=_GOOD.get(str(rank.get("state")), "yellow")),
                Text(age_text(age) if isinstance(age, int | float) else "", style="bold red" if worrying else ""),
                size_text(used) if isinstance(used, int | float) and used else "",
            )
            first = ["", "", Text()]
        for fault in _faults(worker):
            table.add_row("", "", Text(fault, style="bold red", overflow="fold"))
    if not fleet.workers:
        table.add_row("", "", Text("no worker was heard yet", style="dim"))
    return table


def _jobs(fleet: Fleet, now: float) -> Table:
    table = Table(
        "job", "worker", Column("", width=12), Column("progress", overflow="fold", ratio=1), "for", expand=True
    )
    for job in fleet.going_on:
        since = age_text(now - job.begun_at)
        table.add_row(job.job_id, str(job.data.get("worker_id", "?")), _bar(job), _job_text(job), since)
    for job in fleet.ended[:_ENDED_SHOWN]:
        style = "green" if job.last == "succeeded" else "red"
        text = failure_text(job.data) if job.last == "failed" else job.last
        ago = f"{age_text(now - job.changed_at)} ago"
        table.add_row(job.job_id, str(job.data.get("worker_id", "?")), "", Text(text, style=style), ago)
    if not table.row_count:
        table.add_row("", "", "", Text("no job since this began to listen", style="dim"))
    return table


def _queues(depths: Depths) -> Table:
    table = Table("pool", Column("waiting", justify="right"), Column("dead letters", justify="right"))
    for pool, depth in depths.items():
        dead = depth["dead"]
        cells = ("?" if count is None else str(count) for count in (depth["waiting"], dead))
        table.add_row(pool, next(cells), Text(next(cells), style="red" if dead else ""))
    return table


def _bar(job: JobSeen) -> RenderableType:
    step, steps = job.data.get("step"), job.data.get("steps")
    if not isinstance(step, int) or not isinstance(steps, int) or steps <= 0:
        return ""
    return ProgressBar(total=steps, completed=step, width=12)


def _job_text(job: JobSeen) -> str:
    if job.last == "retrying":
        return f"retrying: {failure_text(job.data)}"
    return progress_text(job.data) if job.last == "progress" else job.last


def _state(worker: Worker, now: float) -> tuple[str, str]:
    """The worker's state in words, and its colour."""
    if worker.is_silent(now):
        return f"silent for {age_text(worker.age_seconds(now))}", "bold red"
    if worker.life in ("stopped", "draining"):
        return worker.life, "dim" if worker.life == "stopped" else "yellow"
    state = str(worker.heartbeat.get("state") or worker.life or "?")
    return state, _GOOD.get(state, "yellow")


def _faults(worker: Worker) -> Iterator[str]:
    if worker.life == "stopped" or not worker.heartbeat:
        return
    states = {str(rank.get("state")) for rank in worker.ranks}
    consumer, publisher = str(worker.heartbeat.get("consumer")), str(worker.heartbeat.get("publisher"))
    if consumer != "consuming" and not states & {"starting", "joining", "loading"} and worker.life != "draining":
        yield f"consumer: {consumer}"
    if publisher != "connected":
        yield f"publisher: {publisher}"
    if len(processes := worker.processes) > 1:
        yield f"{len(processes)} workers have this worker_id: {', '.join(processes)}"
    if abs(worker.clock_ahead_seconds) > _SKEW_SECONDS:
        ahead = worker.clock_ahead_seconds
        yield f"its clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"


def _doing(rank: dict[str, Any]) -> str:
    step = f" {rank['step']}/{rank['steps']}" if rank.get("steps") and rank.get("phase") != "load" else ""
    if rank.get("phase") == "load" and rank.get("steps"):
        step = f" {100 * rank['step'] // rank['steps']} %"
    return f"{rank.get('phase') or rank.get('state') or '?'}{step}"


def _sorted(fleet: Fleet) -> list[Worker]:
    return sorted(fleet.workers.values(), key=lambda worker: (str(worker.heartbeat.get("pool")), worker.worker_id))
