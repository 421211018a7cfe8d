"""One machine with a real systemd, and one worker with an endpoint, for the whole run; made when a test first asks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.machine import Machine
from tests.service.running import Service, running_service


@pytest.fixture(scope="session")
def machine(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Booted, with reeld laid out, the tiny models in /srv/models and tests/faults in /srv/faults."""
    models.chmod(0o755)  # pytest's folders are for their owner only, and the unit's user is another
    with Machine(tmp_path_factory.mktemp("machine"), binds=[(models, "/srv/models", True)]) as booted:
        yield booted


@pytest.fixture(scope="session")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A worker of two ranks with a broker of its own, for metrics, health and logs; test_readiness.py drains it."""
    with running_service(models, tmp_path_factory.mktemp("service")) as running:
        yield running
