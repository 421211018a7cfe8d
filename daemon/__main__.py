"""Every rank's entry: `torchrun --nproc-per-node N -m daemon`, or as started by `reeld run`.

The configuration file is named by REELD_CONFIG. Logs are set up before anything heavy is imported, because
what torch, xfuser and DiffSynth print while they are imported belongs in the logs as well.
"""

import ctypes
import gc
import os
import signal
import sys
from pathlib import Path

from daemon.config import load_config
from daemon.errors import ConfigError, FatalError
from daemon.logs import finish_logs, setup_logs

CONFIG_VARIABLE = "REELD_CONFIG"


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Has the kernel end this rank when the agent that started it is gone: nobody else would, and it holds a GPU."""
    if "LOCAL_RANK" not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:  # it died before the call
        os._exit(1)


def main() -> int:
    die_with_parent()
    if "REELD_LAUNCHER" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the launcher, from the first line on
    rank = int(os.environ.get("RANK", "0"))
    path = os.environ.get(CONFIG_VARIABLE)
    fault: ConfigError | None = None
    config = None
    try:
        config = load_config(Path(path) if path else None)
    except ConfigError as error:
        fault = error
    setup_logs(
        format_=os.environ.get("REELD_LOG_FORMAT_RESOLVED") or (config.log.format if config else "auto"),
        level=config.log.level if config else "info",
        rank=rank,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        capture=True,
        directory=config.log.directory if config else None,
    )
    import structlog

    log = structlog.get_logger("process")
    try:
        if config is None:
            assert fault is not None
            raise fault
        gc.disable()  # millions of objects are made and none is garbage: a tenth of the imports' time
        from daemon.rank import run_rank

        gc.freeze()
        gc.enable()

        return run_rank(config)
    except FatalError as error:
        for line in str(error).splitlines():
            log.critical("fatal", reason=line, exit_status=int(error.exit_status))
        return int(error.exit_status)
    except Exception:
        # The one broad catch: the top of the process, which it ends.
        log.exception("crashed")
        return 1
    finally:
        finish_logs()


if __name__ == "__main__":
    status = main()
    # Not sys.exit: interpreter shutdown would wait for threads that a broken process group holds.
    sys.stdout.flush()
    os._exit(status)
