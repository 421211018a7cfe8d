"""What the logs show of an error, and what they keep to themselves."""

import subprocess
import sys

import pytest

_FAILS = """
import sys
from daemon.logs import setup_logs
setup_logs(format_=sys.argv[1], level="info", rank=None, local_rank=None, world_size=1, capture=False)
import structlog

def connect(address):
    url = "amqp://reeld:" + address
    raise AttributeError("nobody foresaw this")

def run():
    connect(bytes.fromhex("7333637233744070").decode() + "lace")

if sys.argv[2] == "logged":
    try:
        run()
    except AttributeError:
        structlog.get_logger("consumer").critical("consumer_failed", exc_info=True)
else:
    run()
"""


@pytest.mark.parametrize("how", ["logged", "uncaught"])
@pytest.mark.parametrize("format_", ["console", "json"])
def test_a_traceback_shows_no_variables(format_: str, how: str) -> None:
    """On a terminal too: among the variables of the frames that opened a connection is the URL with its password."""
    done = subprocess.run([sys.executable, "-c", _FAILS, format_, how], capture_output=True, text=True, check=False)
    assert "nobody foresaw this" in done.stderr
    assert "in connect" in done.stderr, "the traceback itself is there"
    assert "s3cr3t" not in done.stdout + done.stderr
