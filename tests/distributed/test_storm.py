"""A short storm: 100 jobs and 20 faults of the network, the broker and the processes, with the checker at the end.

`make storm` runs longer ones, on two daemons.
"""

import os
from pathlib import Path

import pytest

from tests.storm.run import Storm

# Drawn with it, among others: rank 0, a peer, the launcher and the broker killed, an alarm, stopped processes, a drip.
SEED = int(os.environ.get("STORM_SEED", "20"))

pytestmark = pytest.mark.broker  # its own, which it kills


@pytest.mark.usefixtures("pikas_sockets")
@pytest.mark.timeout(1500)
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_short_storm_loses_nothing(models: Path, tmp_path: Path) -> None:
    """Every job ends once, under the checker's rules, whatever happened meanwhile."""
    storm = Storm(tmp_path / "storm", models, seed=SEED, jobs=100, faults=20, ranks=(2,), say=print)
    verdict = storm.run()
    print((storm.folder / "report.md").read_text())
    assert verdict.violations == []
    assert storm.observed.broken_off == ""
    assert storm.observed.unnoticed == []
    assert storm.observed.met.total() >= 15, "most faults met something"
    assert verdict.counts["redeliveries"] > 0
