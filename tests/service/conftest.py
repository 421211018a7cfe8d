"""One machine with a real systemd for the whole run; each test module brings instances of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.machine import Machine


@pytest.fixture(scope="session")
def machine(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Booted, with reeld laid out, the tiny models in /srv/models and tests/faults in /srv/faults."""
    models.chmod(0o755)  # pytest's folders are for their owner only, and the unit's user is another
    with Machine(tmp_path_factory.mktemp("machine"), binds=[(models, "/srv/models", True)]) as booted:
        yield booted
