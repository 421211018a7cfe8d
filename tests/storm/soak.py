"""`make soak`: hours' worth of jobs in minutes, and whether anything grows.

Owns sampling every process of a daemon (resident memory, threads, file descriptors) and the queues, and judging the
curves: after the warm-up, the first third against the last. There are no faults; the checker judges the jobs as ever.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.node import Node
from tests.storm.ends import Listener, Publisher
from tests.storm.faults import Faults
from tests.storm.fleet import tiny_models
from tests.storm.run import Storm, waiting
from tests.verdict import Verdict

_SAMPLE_SECONDS = 3.0
_WARM_UP = 0.2  # of the time
_RSS_GROWTH = 0.02  # the most that a curve may rise
_JOBS_AT_MOST = 20_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment. `seconds` since the soak began."""

    seconds: float
    process: str
    rss_bytes: int
    threads: int
    fds: int


@dataclass(frozen=True, slots=True)
class Curve:
    """How one process was in the first and in the last third after the warm-up.

    Medians: what is never given back is in every sample from then on, a file that is just being read in one.
    """

    process: str
    rss_first_bytes: int
    rss_last_bytes: int
    threads_first: int
    threads_last: int
    fds_first: int
    fds_last: int

    @property
    def rss_growth(self) -> float:
        return (self.rss_last_bytes - self.rss_first_bytes) / self.rss_first_bytes

    @property
    def flat(self) -> bool:
        """Memory within its bound, and not one thread or descriptor more."""
        return (
            self.rss_growth <= _RSS_GROWTH
            and self.threads_last <= self.threads_first
            and self.fds_last <= self.fds_first
        )


def curves_of(samples: list[Sample], *, until_seconds: float) -> list[Curve]:
    """Each process's curve. Raises ValueError when a process was sampled too seldom to say anything."""
    begin = until_seconds * _WARM_UP
    third = (until_seconds - begin) / 3
    curves = []
    for process in sorted({sample.process for sample in samples}):
        own = [sample for sample in samples if sample.process == process]
        first = [sample for sample in own if begin <= sample.seconds < begin + third]
        last = [sample for sample in own if sample.seconds >= until_seconds - third]
        if min(len(first), len(last)) < 3:
            raise ValueError(f"{process}: {len(first)} and {len(last)} samples; the soak was too short")
        curves.append(
            Curve(
                process=process,
                rss_first_bytes=int(statistics.median(sample.rss_bytes for sample in first)),
                rss_last_bytes=int(statistics.median(sample.rss_bytes for sample in last)),
                threads_first=statistics.median_low(sample.threads for sample in first),
                threads_last=statistics.median_low(sample.threads for sample in last),
                fds_first=statistics.median_low(sample.fds for sample in first),
                fds_last=statistics.median_low(sample.fds for sample in last),
            )
        )
    return curves


class Soak(Storm):
    """A storm without faults that lasts as long as it is told, and is watched."""

    def __init__(self, folder: Path, models: Path, *, seed: int, minutes: float, ranks: int) -> None:
        super().__init__(
            folder, models, seed=seed, jobs=_JOBS_AT_MOST, faults=0, ranks=(ranks,), say=lambda _line: None
        )
        self._seconds = minutes * 60
        self.samples: list[Sample] = []
        self.waiting_at_most = 0
        self.curves: list[Curve] = []
        self.ended = 0

    def _blow(self, _faults: Faults, publisher: Publisher, listener: Listener, node: Node) -> None:
        self._wait(300, lambda: listener.ended() > 0)  # the daemon has begun to work
        begun = time.monotonic()
        while (now := time.monotonic() - begun) < self._seconds:
            self._sample(now)
            self.waiting_at_most = max(self.waiting_at_most, waiting(node))
            self._wait(_SAMPLE_SECONDS, lambda: False)
        publisher.finish()
        self.ended = listener.ended()
        self.curves = curves_of(self.samples, until_seconds=self._seconds)

    def _sample(self, now: float) -> None:
        for daemon in self._daemons:
            processes = {"launcher": daemon.launcher(), **{f"rank {n}": daemon.rank(n) for n in range(daemon.ranks)}}
            for name, process in processes.items():
                assert process is not None, f"{name} is not there"
                with process.oneshot():
                    self.samples.append(
                        Sample(
                            seconds=round(now, 2),
                            process=name,
                            rss_bytes=process.memory_info().rss,
                            threads=process.num_threads(),
                            fds=process.num_fds(),
                        )
                    )

    def _report(self, verdict: Verdict, broker: str) -> None:
        figures: dict[str, Any] = {
            "seed": self.schedule.seed,
            "minutes": self._seconds / 60,
            "broker": broker,
            "jobs_ended": self.ended,
            "flat": all(curve.flat for curve in self.curves),
            "correct": verdict.correct,
            "messages_waiting_at_most": self.waiting_at_most,
            "curves": [{**asdict(curve), "rss_growth": round(curve.rss_growth, 5)} for curve in self.curves],
            "samples": [asdict(sample) for sample in self.samples],
        }
        (self.folder / "soak.json").write_text(json.dumps(figures, indent=1))
        lines = [
            f"# Soak of seed {self.schedule.seed}: {'flat' if figures['flat'] else 'NOT flat'}, "
            f"{'correct' if verdict.correct else 'NOT correct'}",
            "",
            f"{self.ended} jobs in {self._seconds / 60:g} minutes on RabbitMQ {broker}; "
            f"never more than {self.waiting_at_most} messages in the job queues.",
            "",
            "| process | RSS, first third | last third | growth | threads | file descriptors |",
            "|---|---|---|---|---|---|",
            *(
                f"| {curve.process} | {curve.rss_first_bytes / 1e6:.1f} MB | {curve.rss_last_bytes / 1e6:.1f} MB | "
                f"{curve.rss_growth:+.2%} | {curve.threads_first} → {curve.threads_last} | "
                f"{curve.fds_first} → {curve.fds_last} |"
                for curve in self.curves
            ),
            *(f"- {violation}" for violation in verdict.violations[:50]),
        ]
        (self.folder / "report.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="reeld-soak-")) / "soak"
    models = tiny_models(Path(tempfile.gettempdir()) / "reeld-storm-models")
    soak = Soak(folder, models, seed=asked.seed, minutes=asked.minutes, ranks=asked.ranks)
    verdict = soak.run()
    print((folder / "report.md").read_text())
    print(f"figures, history and report: {folder}")
    return 0 if verdict.correct and soak.curves and all(curve.flat for curve in soak.curves) else 1


if __name__ == "__main__":
    sys.exit(main())
