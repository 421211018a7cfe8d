"""The launcher: has the configuration validated, then runs torchrun's agent in this process.

It is the unit's main process, because systemd sees only the main process's exit status and torchrun hides the
ranks'. Owns the exit status, the restart of a broken group, and passing on the wish to drain. Leaves out what a rank
does (`daemon.rank`), what systemd is told (`daemon.service_state`) and what can be wrong (`daemon.validation`).
"""

import contextlib
import fcntl
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from daemon.config import Config
from daemon.entry import CONFIG_VARIABLE, main_in_group
from daemon.errors import ExitStatus, FatalError
from daemon.fork_server import start_fork_server
from daemon.group_watch import GroupWatch
from daemon.logs import (
    CONFIG_FILE,
    DRAIN_MARK,
    FORMAT_VARIABLE,
    LOCK_VARIABLE,
    READY_MARK,
    RUNTIME_VARIABLE,
    STACKS_FILE,
    finish_logs,
    log_format_for_ranks,
    setup_logs,
)
from daemon.notify import Notifier
from daemon.preflight import look_at_broker
from daemon.rank_processes import LAUNCHER_VARIABLE, exit_statuses, kill_fork_server, kill_ranks, rank_processes
from daemon.service_state import ServiceState
from daemon.signals import DRAIN_SIGNAL
from daemon.validation import check, known_nproc
from daemon.vitals import Vitals

log = structlog.get_logger("launcher")

# A group that finished a job, or was ready for this long, has earned a quick restart. One that does neither is
# restarted ever more slowly, and at last given up: a box that kills each of its jobs must not eat the queue.
_STABLE_SECONDS = 3600.0
_RESTARTS_IN_A_ROW = 10
_LONGEST_PAUSE_SECONDS = 30.0
# What comes after a drain's limit and grace: the ranks are dead, this process ends.
_LEAVE_SECONDS = 30.0


def run(config: Config, config_path: Path | None) -> int:
    """Runs the ranks until they are drained. Returns the exit status. Raises ConfigError before anything starts."""
    notifier = Notifier.from_environment()
    check(config, make_folders=True)
    nproc = _resolve_nproc(config)
    with tempfile.TemporaryDirectory(prefix="reeld-") as runtime, _kept(Path(runtime)):
        format_ = log_format_for_ranks(config.log.format)
        os.environ[LOCK_VARIABLE] = str(Path(runtime) / "log.lock")
        os.environ[RUNTIME_VARIABLE] = runtime
        os.environ[FORMAT_VARIABLE] = format_
        os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
        if config_path is not None:
            os.environ[CONFIG_VARIABLE] = str(config_path.resolve())
            (Path(runtime) / CONFIG_FILE).write_text(os.environ[CONFIG_VARIABLE])
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
            return _Launcher(config, nproc, Path(runtime), ServiceState(notifier, nproc=nproc)).run()
        finally:
            finish_logs()


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Holds a lock by which systemd-tmpfiles leaves a folder alone: what in it is written once, such as the mark that
    the ranks heed signals, would be cleaned away by age. Source: tmpfiles.d(5), "Age"."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


class _DrainedWhileStarting(BaseException):
    """Raised by the signal handler: nothing is held yet, so the ranks can simply be ended.

    A BaseException, because it must get through torchrun's agent, which ends its ranks on the way.
    """


class RestartPolicy:
    """Whether a group that failed is started again, and after which pause."""

    def __init__(self) -> None:
        self.failures = 0

    def pause_seconds(self, *, ready_seconds: float, jobs_succeeded: int) -> float | None:
        """After a group that was ready for so long, and finished so many jobs. None: it is given up."""
        if jobs_succeeded > 0 or ready_seconds > _STABLE_SECONDS:
            self.failures = 0
        self.failures += 1
        if self.failures > _RESTARTS_IN_A_ROW:
            return None
        return 0.0 if self.failures == 1 else min(_LONGEST_PAUSE_SECONDS, 2.0 ** (self.failures - 1))


class _Launcher:
    def __init__(self, config: Config, nproc: int, runtime: Path, service: ServiceState) -> None:
        self._config = config
        self._nproc = nproc
        self._start_method = config.rank_start_method
        self._runtime = runtime
        self._service = service
        self._ready = runtime / READY_MARK
        self._draining = False
        self._overdue = False
        self._vitals = Vitals(config, nproc)
        self._ended_by = "rank_failed"
        self._on_restart: Callable[[str], None] = lambda _reason: None

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_overdue)
        try:
            with contextlib.ExitStack() as stack:
                self._open_endpoint(stack)
                self._service.progress()
                if self._start_method == "forkserver":
                    start_fork_server()
                self._service.say("looking at the broker")
                look_at_broker(self._config)
                return self._run_groups()
        except FatalError as error:
            for line in str(error).splitlines():
                log.critical("fatal", reason=line, exit_status=int(error.exit_status))
            return int(error.exit_status)
        except _DrainedWhileStarting:
            log.info("stopped", exit_status=0, reason="asked to while starting")
            return int(ExitStatus.OK)
        finally:
            signal.alarm(0)
            kill_fork_server(self._runtime)

    def _open_endpoint(self, stack: contextlib.ExitStack) -> None:
        """Answers Prometheus and health checks until the stack is closed. Raises ConfigError when it cannot."""
        if self._config.metrics.address is None:
            return
        from daemon.endpoint import Endpoint
        from daemon.metrics import Metrics

        metrics = Metrics(self._config, self._vitals, self._runtime, world_size=self._nproc)
        self._on_restart = stack.enter_context(metrics).group_restarted
        stack.enter_context(Endpoint(self._config.metrics, metrics, self._vitals))

    def _run_groups(self) -> int:
        policy = RestartPolicy()
        while True:
            log.info("starting_ranks", nproc_per_node=self._nproc)
            self._service.progress()
            self._service.say(f"starting {self._nproc} rank{'s' if self._nproc > 1 else ''}")
            self._ready.unlink(missing_ok=True)
            status, jobs_succeeded = self._run_group()
            self._log_crashes()
            if self._overdue:
                log.warning("stopped", exit_status=0, reason="the drain took too long; the job goes back to the queue")
                return int(ExitStatus.OK)
            if status in (ExitStatus.OK, ExitStatus.CONFIG, ExitStatus.NOPERM):
                log.info("stopped", exit_status=status)
                return status
            if status == ExitStatus.CUDA_FORKED and self._start_method == "forkserver":
                log.warning("ranks_start_alone", reason="CUDA was used in the process that ranks are forked from")
                self._start_method = "spawn"
                kill_fork_server(self._runtime)  # it holds the memory of all imports
                continue
            if (self._runtime / DRAIN_MARK).exists():
                # 0, or systemd would start again what somebody wanted out of service.
                log.error(
                    "stopped", exit_status=0, rank_status=status, reason="a rank failed while draining by message"
                )
                return int(ExitStatus.OK)
            if self._draining:
                log.error("stopped", exit_status=status, reason="a rank failed while draining")
                return int(ExitStatus.FAILED)
            pause = policy.pause_seconds(ready_seconds=self._ready_seconds(), jobs_succeeded=jobs_succeeded)
            if pause is None:
                reason = f"{policy.failures} groups in a row failed without finishing a job"
                log.critical("stopped", exit_status=status, reason=reason)
                return int(ExitStatus.FAILED)
            log.error("group_failed", exit_status=status, restart_in_seconds=pause)
            self._vitals.group_ended(f"the group failed with status {status}; it starts again in {pause:g} s")
            self._on_restart(self._ended_by)
            self._service.say(f"the ranks failed with exit status {status}; starting them again in {pause:g} s")
            self._pause(pause)
            if self._draining:
                log.info("stopped", exit_status=0, reason="asked to between two groups")
                return int(ExitStatus.OK)

    def _run_group(self) -> tuple[int, int]:
        """One group of ranks, from start to end.

        Returns the exit status of the rank that ended it, and how many jobs it finished with a video.
        """
        from parallel.agent import RanksNotStartedError, run_ranks

        stall = self._config.stall
        with GroupWatch(
            self._runtime,
            self._nproc,
            join_seconds=stall.join_seconds,
            silence_seconds=stall.silence_seconds,
            grace_seconds=self._config.limits.outcome_grace_seconds,
            on_progress=self._service.ranks,
        ) as watch:
            self._vitals.group_started(watch)
            try:
                statuses = run_ranks(
                    main_in_group,
                    nproc_per_node=self._nproc,
                    start_method=self._start_method,
                    log_directory=self._runtime / "torchrun",
                )
            except RanksNotStartedError as error:
                log.error("ranks_not_started", reason=str(error))  # noqa: TRY400  the trace says nothing more
                statuses = {0: int(ExitStatus.FAILED)}
        self._ended_by = watch.ended_by or "rank_failed"
        if not statuses:
            return int(ExitStatus.OK), watch.jobs_succeeded
        statuses |= {
            rank: status
            for rank, status in exit_statuses(self._runtime, self._nproc).items()
            if status != ExitStatus.OK
        }
        log.error("ranks_failed", exit_statuses=statuses)
        # Rank 0 decides what a failure means; a peer that merely lost its rank 0 says nothing new.
        status = statuses.get(0) or next(iter(statuses.values())) or int(ExitStatus.FAILED)
        return status, watch.jobs_succeeded

    def _ready_seconds(self) -> float:
        try:
            return time.time() - self._ready.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _on_signal(self, number: int, _frame: object) -> None:
        again, self._draining = self._draining, True
        self._vitals.draining = True
        limits = self._config.limits
        self._service.stopping(within_seconds=limits.drain_seconds + limits.outcome_grace_seconds + _LEAVE_SECONDS)
        # Rank 0 obeys at its next step. A step that takes longer than this is not waited for.
        signal.alarm(math.ceil(limits.outcome_grace_seconds + (0 if again else limits.drain_seconds)))
        if not self._ready.exists():
            if not again:
                raise _DrainedWhileStarting
            return
        rank0 = rank_processes(self._runtime).get(0)
        log.info("signal", signal=signal.Signals(number).name, forwarded_to=rank0.pid if rank0 else None)
        if rank0 is not None:
            rank0.send_signal(DRAIN_SIGNAL)

    def _on_overdue(self, _number: int, _frame: object) -> None:
        self._overdue = True
        log.error("drain_overdue", ranks_killed=kill_ranks(self._runtime))

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._draining and (left := end - time.monotonic()) > 0:
            self._service.progress()
            signal.sigtimedwait([signal.SIGCHLD], min(left, 1.0))

    def _log_crashes(self) -> None:
        """Turns the faulthandler traces that dead ranks left into log lines, and clears the way for the next group."""
        for path in self._runtime.glob(STACKS_FILE.format(rank="*")):
            path.unlink()
        for path in sorted(self._runtime.glob("rank-*.txt")):
            trace = path.read_text(errors="backslashreplace")
            if trace.strip():
                log.critical("rank_crashed", file=path.name, trace=trace)
            path.unlink()


def _resolve_nproc(config: Config) -> int:
    known = known_nproc(config)
    if known is not None:
        return known
    from parallel.agent import count_gpus

    return max(1, count_gpus())
