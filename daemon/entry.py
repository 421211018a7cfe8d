"""Every rank's entry, whether torchrun started it as a program or `reeld run` had it forked.

The configuration file is named by REELD_CONFIG. Logs are set up before anything heavy is imported, because what torch,
xfuser and DiffSynth print while they are imported belongs in the logs as well. Leaves out what a rank does
(`daemon.rank`).
"""

import gc
import os
import signal
from pathlib import Path

from daemon.config import load_config
from daemon.errors import ConfigError, ExitStatus, FatalError
from daemon.logs import FORMAT_VARIABLE, RUNTIME_VARIABLE, finish_logs, setup_logs
from daemon.rank_processes import LAUNCHER_VARIABLE, announce, announce_exit, die_with_parent

CONFIG_VARIABLE = "REELD_CONFIG"


def import_rank() -> None:
    """Imports everything that a rank needs; nothing when that is done."""
    gc.disable()  # millions of objects are made and none is garbage: a tenth of the imports' time
    import daemon.rank  # noqa: F401
    from parallel.forward import load_compiler

    load_compiler()
    gc.freeze()
    gc.enable()


def main_in_group() -> None:
    """A rank that the launcher's agent calls as a function. Returns only when the rank ends well."""
    status = main()
    announce_exit(Path(os.environ[RUNTIME_VARIABLE]), int(os.environ["RANK"]), status)
    if status != ExitStatus.OK:
        # Not sys.exit: it would wait for threads that a broken process group holds.
        os._exit(status)


def main() -> int:
    """One rank, from start to end. Returns its exit status."""
    if "LOCAL_RANK" in os.environ:
        die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    if LAUNCHER_VARIABLE in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the launcher, from the first line on
        announce(Path(os.environ[RUNTIME_VARIABLE]), rank, int(os.environ["WORLD_SIZE"]))
    path = os.environ.get(CONFIG_VARIABLE)
    fault: ConfigError | None = None
    config = None
    try:
        config = load_config(Path(path) if path else None)
    except ConfigError as error:
        fault = error
    setup_logs(
        format_=os.environ.get(FORMAT_VARIABLE) or (config.log.format if config else "auto"),
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
        import_rank()
        from daemon.rank import run_rank

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
