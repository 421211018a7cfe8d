"""`make storm`: a storm by seed, its report, and exit status 0 when the checker found nothing."""

import argparse
import math
import secrets
import sys
import tempfile
from pathlib import Path

from tests.storm.fleet import tiny_models
from tests.storm.run import Storm


def main() -> int:
    parser = argparse.ArgumentParser(prog="storm", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--faults", type=int, help="by default one for five jobs")
    parser.add_argument("--seed", type=int, help="by default one that is drawn and printed")
    parser.add_argument("--ranks", default="2,1", help="ranks of each daemon, as 2,1")
    parser.add_argument("--folder", type=Path, help="where the history and the report go")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no more jobs and faults after so long")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="reeld-storm-")) / "storm"
    seed = secrets.randbelow(10**6) if asked.seed is None else asked.seed
    storm = Storm(
        folder,
        tiny_models(Path(tempfile.gettempdir()) / "reeld-storm-models"),
        seed=seed,
        jobs=asked.jobs,
        faults=max(1, asked.jobs // 5) if asked.faults is None else asked.faults,
        ranks=tuple(int(count) for count in asked.ranks.split(",")),
        say=lambda line: print(line, flush=True),
        minutes=asked.minutes,
    )
    verdict = storm.run()
    print((folder / "report.md").read_text())
    print(f"history, logs and report: {folder}")
    return 0 if verdict.correct and not storm.observed.unnoticed else 1


if __name__ == "__main__":
    sys.exit(main())
