"""A process that has imported everything and forks ranks from that: `python -m tests.distributed.nursery`.

Imports are most of what a short test of some ranks takes, and the same for all. A test of how ranks are started, or
of one that dies, uses torchrun; the references of plain DiffSynth have processes of their own that import less.

Reads one JSON request a line: {"module", "arguments", "ranks", "output"}; runs `tests.distributed.<module>` as
`__main__` in that many forked processes, with torchrun's environment, their output in a file; answers with one line of
JSON: the exit statuses. When one fails the others are ended.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import xfuser.core.distributed  # noqa: F401  for all that fork
from diffsynth.pipelines.wan_video import WanVideoPipeline  # noqa: F401

import parallel.engine
import parallel.model
import parallel.tiny
import parallel.world  # noqa: F401
from ops.private_broker import free_ports


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        (port,) = free_ports(1)
        pids = [_fork(request, rank, port) for rank in range(request["ranks"])]
        print(json.dumps(_wait(pids)), flush=True)


def _fork(request: dict[str, object], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        out = os.open(str(request["output"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(out, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        ranks = request["ranks"]
        if ranks != 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = request["arguments"]
        assert isinstance(arguments, list)
        sys.argv = [str(request["module"]), *arguments]
        runpy.run_module(f"tests.distributed.{request['module']}", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  the top of a process, which ends it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pids: list[int]) -> list[int]:
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        pid, status = os.wait()
        if pid not in pids:
            continue
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid]:
            for other in set(pids) - set(statuses):
                os.kill(other, signal.SIGKILL)
    return [statuses[pid] for pid in pids]


if __name__ == "__main__":
    main()
