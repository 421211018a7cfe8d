"""A rank's life in four verbs: join, load, serve, leave. The one place that branches on rank.

Leaves out the launcher, and what rank 0 does with a job (`daemon.coordinator`).
"""

import contextlib
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from daemon import __version__
from daemon.attempt import RankContext, attempt_plan
from daemon.broker_url import redacted
from daemon.config import Config
from daemon.consumer import Consumer
from daemon.coordinator import Coordinator
from daemon.errors import ConfigError, ExitStatus, FatalError, GroupBrokenError, TransientJobError
from daemon.health import HealthThread, Pulse, RankState, pulse_path
from daemon.logs import DRAIN_MARK, READY_MARK, RUNTIME_VARIABLE, WARM_UP_MARK, finish_logs, leave_mark
from daemon.measurements import Measurements
from daemon.models import check_models
from daemon.presence import Presence
from daemon.publisher import Publisher
from daemon.rank_processes import LAUNCHER_VARIABLE
from daemon.reporter import Reporter
from daemon.signals import DRAIN_SIGNAL
from daemon.stall import StallLimits, own_stacks
from daemon.storage import Storage
from daemon.topology import prepare_topology, topology_of
from daemon.warm_up import warm_up
from parallel.checksums import verify_checksums
from parallel.device import CudaForkedError
from parallel.engine import memory_bytes
from parallel.loading import ReadError, Throttled
from parallel.model import LoadedModel, load_model
from parallel.outcome import Stop
from parallel.plan import Generate, Shutdown
from parallel.profile import ModelFiles, ModelFolderError
from parallel.strategy import MemorySettings
from parallel.world import HealthBoard, Launch, World, join, read_launch

log = structlog.get_logger("process")

_LOADING_LOG_SECONDS = 5.0
_SERVED_MARK = "served"  # a group of this launcher has consumed: what refuses the next one may pass
_STATUS_CHARACTERS = 500  # of a pulse's 4096 bytes, twice


def run_rank(config: Config) -> int:
    """Joins, loads, serves and leaves. Returns the exit status; raises FatalError as documented there."""
    launch = read_launch()
    state = RankState(StallLimits(config.stall))
    health = _health(config, launch, state)
    state.set("joining", phase="join")
    with _passing_if_served():
        files = check_models(config, world_size=launch.world_size)
    try:
        world = join(launch, device_kind=config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except CudaForkedError as error:
        log.warning("cuda_forked", reason=str(error))
        return int(ExitStatus.CUDA_FORKED)
    log.info("joined", device=str(world.device))
    health.memory = lambda: memory_bytes(world.device)
    health.board = HealthBoard(launch)
    try:
        if world.rank == 0:
            status = _coordinate(config, world, state, health, files)
        else:
            status = _follow(config, world, state, files)
    except (GroupBrokenError, RuntimeError) as error:
        # RuntimeError is what gloo raises when another rank is gone.
        log.critical("group_broken", reason=str(error).splitlines()[0], exc_info=True)
        return int(ExitStatus.GROUP_BROKEN)
    world.leave()
    state.set("left")
    health.stop()
    log.info("left")
    return status


@contextlib.contextmanager
def _passing_if_served() -> Iterator[None]:
    """What a group of this launcher has loaded before was right, so a fault of its files may pass (a file server that
    is away). Raises FatalError for ConfigError then: the group is started again, as after any other failure."""
    try:
        yield
    except ConfigError as error:
        if _served_before():
            raise FatalError(f"{error} (it was in order when this worker began)") from error
        raise


def _served_before() -> bool:
    mark = _served_mark()
    return mark is not None and mark.exists()


def _served_mark() -> Path | None:
    runtime = os.environ.get(RUNTIME_VARIABLE)
    return Path(runtime) / _SERVED_MARK if runtime else None


@_passing_if_served()
def _load(
    config: Config,
    world: World,
    state: RankState,
    files: list[ModelFiles],
    *,
    on_loaded: Callable[[str, float], None] = lambda _model, _seconds: None,
) -> Mapping[str, LoadedModel]:
    models: dict[str, LoadedModel] = {}
    for configured, each in zip(config.models, files, strict=True):
        name = each.profile.name
        state.set("loading", phase="load", work=name)
        begun = time.monotonic()
        told = Throttled(partial(_log_loading, name), interval_seconds=_LOADING_LOG_SECONDS)

        def progress(done_bytes: int, total_bytes: int, name: str = name, told: Throttled = told) -> None:
            state.set("loading", phase="load", work=name, step=done_bytes, steps=total_bytes)
            told(done_bytes, total_bytes)

        def on_file(path: Path, name: str = name) -> None:
            state.set("loading", phase="load", work=name)
            log.info("verifying", model=name, file=str(path))

        try:
            if configured.checksums:
                verify_checksums(each, rank=world.rank, world_size=world.world_size, on_file=on_file)
            models[name] = load_model(
                each,
                world=world,
                dtype=config.dtype,
                memory=MemorySettings(config.memory, config.vram_limit_gib),
                pinned=config.parallel.pinned(),
                compile_blocks=_compiles(config, world),
                lora_cache_bytes=config.lora_cache_bytes,
                progress=progress,
            )
        except ModelFolderError as error:
            raise ConfigError(str(error)) from error
        except (ValueError, ReadError) as error:
            raise ConfigError(f"{each.folder}: {error}".splitlines()[0]) from error
        on_loaded(name, time.monotonic() - begun)
        log.info("model_loaded", model=name, memory=config.memory, seconds=round(time.monotonic() - begun, 3))
    return models


def _log_loading(model: str, done_bytes: int, total_bytes: int) -> None:
    log.info("loading", model=model, done_bytes=done_bytes, total_bytes=total_bytes)


def _compiles(config: Config, world: World) -> bool:
    if config.parallel.compile == "auto":
        return world.device.type == "cuda"
    return config.parallel.compile == "on"


def _follow(config: Config, world: World, state: RankState, files: list[ModelFiles]) -> int:
    """A peer: waits for a command, generates, reports its outcome."""
    _on_signals(drain=lambda _reason: None)
    context = RankContext(world, _load(config, world, state, files), state, config.limits.outcome_grace_seconds)
    while True:
        state.set("idle")
        match world.broadcast_command():
            case Shutdown(reason=reason):
                log.info("shutdown", reason=reason)
                state.set("leaving", phase="leave")
                return int(ExitStatus.OK)
            case Generate(plan=plan):
                with structlog.contextvars.bound_contextvars(job_id=plan.job_id, attempt=plan.attempt):
                    attempt_plan(plan, context, decide=lambda: Stop.NO, progress=_log_step)


def _coordinate(config: Config, world: World, state: RankState, health: HealthThread, files: list[ModelFiles]) -> int:
    """Rank 0: consumes, plans, broadcasts, generates, encodes, publishes, acks."""
    topology = topology_of(config)
    runtime = os.environ.get(RUNTIME_VARIABLE)
    measurements = Measurements(Path(runtime) if runtime else None)
    presence = Presence(config.worker_id)
    begun = time.time()
    about = {
        "pool": config.pool_name,
        "versions": _versions(),
        "models": [each.profile.name for each in files],
        "world_size": world.world_size,
    }
    coordinator: Coordinator | None = None
    served = _served_mark()

    def on_control(routing_key: str) -> None:
        if coordinator is not None:
            coordinator.control(routing_key)

    consumer = Consumer(
        config.broker,
        topology,
        worker_id=config.worker_id,
        prepare=lambda connection: prepare_topology(connection, topology, apply=config.topology.apply),
        on_control=on_control,
        on_heartbeat=presence.hear,
        patience_seconds=config.topology.patience_seconds,
        served_before=_served_before(),
        on_first_consuming=partial(leave_mark, served) if served is not None else lambda: None,
        measurements=measurements,
    )
    publisher = Publisher(config.broker, worker_id=config.worker_id, on_failed=consumer.fail, measurements=measurements)
    reporter = Reporter(publisher, topology, worker_id=config.worker_id)

    def heartbeat(ranks: list[dict[str, Any]]) -> None:
        own = ranks[0]
        reporter.worker(
            "heartbeat",
            {
                **about,
                **presence.identity,
                "state": own["state"],
                "job_id": own.get("job_id"),
                "consumer": consumer.status,
                "publisher": publisher.status,
                "draining": coordinator.drain_reason if coordinator is not None else None,
                "heartbeat_seconds": config.heartbeat_seconds,
                "uptime_seconds": round(time.time() - begun, 1),
                "ranks": ranks,
            },
        )

    def service() -> dict[str, Any]:
        return {
            "serving": coordinator is not None,
            "draining": coordinator.drain_reason if coordinator is not None else None,
            "in_hand": consumer.in_hand,
            **{
                name: {"trouble": each.trouble, "status": each.status[:_STATUS_CHARACTERS]}
                for name, each in (("consumer", consumer), ("publisher", publisher))
            },
        }

    publisher.start()
    health.for_launcher = lambda: {"service": service()}
    health.publish = heartbeat
    models = _load(config, world, state, files, on_loaded=measurements.model_loaded)
    context = RankContext(world, models, state, config.limits.outcome_grace_seconds)
    mark = Path(runtime) / WARM_UP_MARK if runtime else None
    warm_up(config, context, compiles=_compiles(config, world), mark=mark)
    storage = Storage(config.output.directory)
    with contextlib.suppress(TransientJobError):  # then the first job says so
        storage.open()
    coordinator = Coordinator(config, context, consumer, reporter, storage, measurements)
    if runtime:
        coordinator.on_drain = partial(leave_mark, Path(runtime) / DRAIN_MARK)
    _on_signals(drain=coordinator.drain, ready=Path(runtime) / READY_MARK if runtime else None)
    log.info("ready", pool=config.pool_name, broker=redacted(config.broker.resolved_url()))
    reporter.worker("started", about)
    consumer.start()
    try:
        reason = coordinator.serve()
        consumer.stop()
        state.set("leaving", phase="leave")
        world.broadcast_command(Shutdown(reason))
        status = int(ExitStatus.OK)
    except GroupBrokenError:
        raise
    except BaseException:
        consumer.stop(timeout_seconds=2)
        raise
    reporter.worker("stopped", {"exit_status": status})
    health.publish = None
    publisher.stop()
    storage.close()
    return status


def _health(config: Config, launch: Launch, state: RankState) -> HealthThread:
    runtime = os.environ.get(RUNTIME_VARIABLE)

    def end_stalled() -> None:
        log.error("rank_stacks", of_rank=launch.rank, of_pid=os.getpid(), threads=own_stacks())
        finish_logs()
        os._exit(ExitStatus.GROUP_BROKEN)  # the main thread is past obeying

    health = HealthThread(
        rank=launch.rank,
        state=state,
        pulse=Pulse(pulse_path(Path(runtime), launch.rank)) if runtime else None,
        interval_seconds=config.heartbeat_seconds,
        silence_seconds=config.stall.silence_seconds,
        join_seconds=config.stall.join_seconds,
        on_stall=end_stalled,
    )
    health.start()
    return health


def _on_signals(*, drain: Callable[[str], None], ready: Path | None = None) -> None:
    def handler(number: int, _frame: object) -> None:
        # The launcher passes on what it was told, by a signal of its own.
        drain("SIGTERM" if number == DRAIN_SIGNAL else signal.Signals(number).name)

    # Under the launcher DRAIN_SIGNAL means drain and SIGTERM means die now, because torchrun's agent sends SIGTERM to
    # the ranks that are left when one has failed. Under a bare torchrun SIGTERM is all there is, and means drain.
    if os.environ.get(LAUNCHER_VARIABLE):
        signal.signal(DRAIN_SIGNAL, handler)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the launcher, which drains
        if ready is not None:
            ready.touch()
    else:
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGINT, handler)


def _log_step(phase: str, step: int, steps: int) -> None:
    log.debug("step", phase=phase, step=step, steps=steps)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "diffsynth", "xfuser", "pika")
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return {
        "reeld": __version__,
        "python": python,
        "system": platform.release(),
        **{n: version(n) for n in names},
    }
