"""A storm's report: one page of Markdown.

Owns what it says. Leaves out judging (`tests.checker`).
"""

import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tests.storm.schedule import Schedule
from tests.verdict import Verdict


@dataclass(slots=True)
class Observed:
    """What the storm itself saw."""

    seconds: float = 0.0
    met: Counter[str] = field(default_factory=Counter)  # faults that met something, by kind
    missed: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    starts: int = 0
    cancels: int = 0
    broken_off: str = ""  # why the storm ended early
    unnoticed: list[str] = field(default_factory=list)


def report(schedule: Schedule, observed: Observed, verdict: Verdict, *, daemons: str, broker: str) -> str:
    """The whole page."""
    counts = verdict.counts
    outcome = "correct, nothing lost" if verdict.correct else f"NOT correct: {len(verdict.violations)} broken rules"
    lines = [
        f"# Storm of seed {schedule.seed}: {outcome}",
        "",
        f"`make storm JOBS={len(schedule.jobs)} FAULTS={len(schedule.faults)} SEED={schedule.seed}`",
        f"took {observed.seconds / 60:.1f} minutes; RabbitMQ {broker}; daemons: {daemons}.",
        "",
        *([f"Broken off: {observed.broken_off}", ""] if observed.broken_off else []),
        *(f"Nobody noticed: {each}\n" for each in observed.unnoticed),
        "| jobs | published | deliveries | redelivered | acks | handed back | terminal events repeated | lost |",
        "|---|---|---|---|---|---|---|---|",
        "| " + " | ".join(
            str(counts[name])
            for name in ("jobs", "published", "deliveries", "redeliveries", "acks", "handed back",
                         "terminal events repeated", "lost")
        ) + " |",
        "",
        f"Daemons were started {observed.starts} times; {observed.cancels} cancels were sent.",
        "",
        "| how requests ended | |",
        "|---|---|",
        *(f"| {name[7:]} | {count} |" for name, count in counts.items() if name.startswith("ended: ")),
        "",
        "| fault | times | met nothing | until the next job started, p50 / max |",
        "|---|---|---|---|",
    ]  # fmt: skip
    for kind in sorted({*observed.met, *observed.missed}):
        times = observed.recoveries.get(kind, [])
        shown = f"{statistics.median(times):.1f} s / {max(times):.1f} s" if times else ""
        lines.append(f"| {kind} | {observed.met[kind]} | {observed.missed[kind] or ''} | {shown} |")
    lines += [f"| all | {observed.met.total()} | {observed.missed.total()} | |", ""]
    lines += ["| jobs of kind | |", "|---|---|"]
    lines += [f"| {kind} | {count} |" for kind, count in Counter(job.kind for job in schedule.jobs).most_common()]
    if verdict.violations:
        lines += ["", "Broken rules:", "", *(f"- {violation}" for violation in verdict.violations[:200])]
    return "\n".join(lines) + "\n"
