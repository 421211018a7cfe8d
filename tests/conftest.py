"""Fixtures that every kind of test shares: one real RabbitMQ for the run, and a virtual host for each test.

A machine without RabbitMQ fails these tests. It never skips them.
"""

import gc
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.private_broker import PrivateBroker
from tests.brokers import enter_root
from tests.harness import fresh_vhost

_SERVICE = "tests/service/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what asks for a broker; these, and the modules that mark themselves, are what `make test-brokers` runs.

    The service's tests come first: they share one machine, so that the other process would wait for their end.
    """
    folder = Path(__file__).with_name("broker")
    for item in items:
        if "broker" in getattr(item, "fixturenames", ()) or folder in item.path.parents:
            item.add_marker("broker")
    items.sort(key=lambda item: not item.nodeid.startswith(_SERVICE))  # is stable


@pytest.hookimpl(optionalhook=True)  # pytest-xdist is not everywhere
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What must run in one of the two processes of `make test`.

    A file's tests share workers; those of the service share a machine with a real systemd. (xdist's own `loadgroup`
    does nothing with pytest 9.2, which keeps no `_nodeid`.)
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # the order of the files puts the long ones first

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # untyped
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return _SERVICE if file.startswith(_SERVICE) else file

    return ByFile(config, log)


@pytest.fixture
def pikas_sockets() -> Iterator[None]:
    """pika leaves the sockets of connections that broke to the garbage collector: here, not in another test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    """The run's RabbitMQ. A test that stops or kills a broker starts one of its own."""
    with PrivateBroker(tmp_path_factory.mktemp("broker"), enter=enter_root()) as running:
        yield running


@pytest.fixture
def vhost(broker: PrivateBroker) -> Iterator[str]:
    """The AMQP URL of a fresh virtual host, which is deleted with all that is in it after the test."""
    with fresh_vhost(broker) as url:
        yield url


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every tiny model, written once a run, in a process of its own: it needs torch."""
    folder = tmp_path_factory.mktemp("models")
    script = "import sys; from pathlib import Path; from parallel.tiny import write_tiny_model; "
    script += "write_tiny_model(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)
    return folder
