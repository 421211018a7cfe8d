"""The launcher: validates the configuration, then runs torchrun's agent in this process.

It is the unit's main process, because systemd sees only the main process's exit status and torchrun hides the
ranks'. Owns the exit status, the restart of a broken group, and passing on the wish to drain. Leaves out what a rank
does (`daemon.rank`).
"""

import os
import signal
import tempfile
import time
from pathlib import Path

import psutil
import structlog

from daemon.config import Config
from daemon.errors import ConfigError, ExitStatus
from daemon.logs import LOCK_VARIABLE, READY_MARK, RUNTIME_VARIABLE, finish_logs, log_format_for_ranks, setup_logs
from daemon.models import check_models
from parallel.profile import ModelFiles

log = structlog.get_logger("launcher")

# A group that was up this long has earned a quick restart; one that dies sooner is restarted ever more slowly.
_STABLE_SECONDS = 60.0
_RESTARTS_IN_A_ROW = 5


def check(config: Config) -> list[ModelFiles]:
    """Everything that can be validated without the broker and the GPUs. Raises ConfigError."""
    files = check_models(config)
    config.broker.resolved_url()
    for directory in filter(None, (config.output.directory, config.work_directory, config.log.directory)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise ConfigError(f"{directory}: not writable: {error.strerror}") from error
    return files


def run(config: Config, config_path: Path | None) -> int:
    """Runs the ranks until they are drained. Returns the exit status. Raises ConfigError before anything starts."""
    check(config)
    nproc = _resolve_nproc(config)
    with tempfile.TemporaryDirectory(prefix="reeld-") as runtime:
        format_ = log_format_for_ranks(config.log.format)
        os.environ[LOCK_VARIABLE] = str(Path(runtime) / "log.lock")
        os.environ[RUNTIME_VARIABLE] = runtime
        os.environ["REELD_LOG_FORMAT_RESOLVED"] = format_
        os.environ["REELD_LAUNCHER"] = str(os.getpid())
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
        if config_path is not None:
            os.environ["REELD_CONFIG"] = str(config_path.resolve())
        setup_logs(
            format_=format_,
            level=config.log.level,
            rank=None,
            local_rank=None,
            world_size=nproc,
            capture=True,
            directory=config.log.directory,
        )
        try:
            return _Launcher(nproc, Path(runtime)).run()
        finally:
            finish_logs()


class _DrainedWhileStarting(BaseException):
    """Raised by the signal handler: nothing is held yet, so the ranks can simply be ended.

    A BaseException, because it must get through torchrun's agent, which ends its ranks on the way.
    """


class _Launcher:
    def __init__(self, nproc: int, runtime: Path) -> None:
        self._nproc = nproc
        self._runtime = runtime
        self._ready = runtime / READY_MARK
        self._draining = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            return self._run_groups()
        except _DrainedWhileStarting:
            log.info("stopped", exit_status=0, reason="asked to while starting")
            return int(ExitStatus.OK)

    def _run_groups(self) -> int:
        failures = 0
        while True:
            log.info("starting_ranks", nproc_per_node=self._nproc)
            begun = time.monotonic()
            self._ready.unlink(missing_ok=True)
            status = self._run_group()
            self._log_crashes()
            if status in (ExitStatus.OK, ExitStatus.CONFIG, ExitStatus.NOPERM):
                log.info("stopped", exit_status=status)
                return status
            if self._draining:
                log.error("stopped", exit_status=status, reason="a rank failed while draining")
                return int(ExitStatus.FAILED)
            failures = 1 if time.monotonic() - begun > _STABLE_SECONDS else failures + 1
            if failures > _RESTARTS_IN_A_ROW:
                log.critical("stopped", exit_status=status, reason=f"{failures} groups in a row did not last")
                return int(ExitStatus.FAILED)
            delay = 0.0 if failures == 1 else min(30.0, 2.0**failures)
            log.error("group_failed", exit_status=status, restart_in_seconds=delay)
            self._pause(delay)
            if self._draining:
                return int(ExitStatus.OK)

    def _run_group(self) -> int:
        """One group of ranks, from start to end. Returns the exit status of the rank that ended it."""
        from parallel.agent import run_ranks

        statuses = run_ranks("daemon", nproc_per_node=self._nproc, log_directory=self._runtime / "torchrun")
        if not statuses:
            return int(ExitStatus.OK)
        log.error("ranks_failed", exit_statuses=statuses)
        # Rank 0 decides what a failure means; a peer that merely lost its rank 0 says nothing new.
        return statuses.get(0) or next(iter(statuses.values())) or int(ExitStatus.FAILED)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._draining = True
        if not self._ready.exists():
            raise _DrainedWhileStarting
        rank0 = self._rank0()
        log.info("signal", signal=signal.Signals(number).name, forwarded_to=rank0.pid if rank0 else None)
        if rank0 is not None:
            rank0.send_signal(signal.SIGUSR1)

    @staticmethod
    def _rank0() -> psutil.Process | None:
        for child in psutil.Process().children():
            try:
                if child.environ().get("RANK") == "0":
                    return child
            except psutil.Error:
                continue
        return None

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._draining and (left := end - time.monotonic()) > 0:
            signal.sigtimedwait([signal.SIGCHLD], min(left, 1.0))

    def _log_crashes(self) -> None:
        """Turns the faulthandler traces that dead ranks left into log lines."""
        for path in sorted(self._runtime.glob("rank-*.txt")):
            trace = path.read_text(errors="backslashreplace")
            if trace.strip():
                log.critical("rank_crashed", file=path.name, trace=trace)
            path.unlink()


def _resolve_nproc(config: Config) -> int:
    if config.nproc_per_node != "auto":
        return config.nproc_per_node
    if config.device == "cpu":
        return 1
    from parallel.agent import count_gpus

    return max(1, count_gpus())
