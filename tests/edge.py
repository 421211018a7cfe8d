"""A daemon that does not generate: everything of `python -m daemon` is real but the generation.

Run as `python -m tests.edge` in the place of a rank. A plan that would be broadcast is encoded and decoded as for
real ranks, and its job then ends as cancelled: thousands of messages can go through the whole edge - consumer, parsing,
planning, staging, settlement, publisher - in the time of a few videos.
"""

import os
import sys

import parallel.world
from daemon.errors import JobCancelled
from parallel.plan import Command, Generate, decode_command, encode_command


def _cut_off(self: parallel.world.World, command: Command | None = None) -> Command:
    assert command is not None
    again = decode_command(encode_command(command))
    assert again == command
    if isinstance(again, Generate):
        raise JobCancelled
    return again


def main() -> int:
    parallel.world.World.broadcast_command = _cut_off  # type: ignore[method-assign]  # the cut itself
    from daemon.entry import main as run_rank  # only now: it imports half of reeld

    return run_rank()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
