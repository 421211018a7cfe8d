"""`reeld doctor`: looks at everything the worker needs and says how to mend what is wrong.

Owns the checks and their advice. Each check really does the thing (connects, reads, writes, runs). Leaves out
torch: importing it takes seconds and may hold a GPU, so `--torch` asks in a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from daemon.client import broker_facts, check_on
from daemon.config import Config, load_config
from daemon.errors import BrokerUnavailableError, ConfigError, CredentialsError, FatalError
from daemon.topology import topology_of
from parallel.profile import ModelFolderError, check_model_folder, load_profile

_CONSUMER_TIMEOUT_DEFAULT_SECONDS = 1800
_FREE_DISK_BYTES = 1 << 30
_TORCH_QUESTION = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
names = [torch.cuda.get_device_name(index) for index in range(count)]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "names": names}))
"""

State = Literal["ok", "warn", "fail"]
_STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `fix` says what to do about it."""

    name: str
    state: State
    text: str
    fix: str = ""


def doctor(config_path: Path | None, *, with_torch: bool = False) -> bool:
    """Prints a table of findings as they are found. True when nothing failed."""
    findings = list(examine(config_path, with_torch=with_torch))
    table = Table("check", "", Column("found", overflow="fold"))
    for finding in findings:
        found = Text(finding.text)
        if finding.fix:
            found.append(f"\n→ {finding.fix}", style="cyan")
        table.add_row(finding.name, Text(finding.state, style=_STYLE[finding.state]), found)
    Console().print(table)
    return all(finding.state != "fail" for finding in findings)


def examine(config_path: Path | None, *, with_torch: bool = False) -> Iterator[Finding]:
    """Every finding, in the order in which a worker would meet them."""
    try:
        config = load_config(config_path)
    except ConfigError as error:
        yield Finding("configuration", "fail", str(error), "correct these fields; `reeld run --check` checks again")
        yield from _machine(None, with_torch=with_torch)
        return
    yield Finding("configuration", "ok", f"{config_path or 'environment'}: pool {config.pool_name}")
    yield from _models(config)
    yield from _broker(config)
    yield _directory("output.directory", config.output.directory)
    yield _directory("work_directory", config.work_directory)
    yield from _machine(config, with_torch=with_torch)


def _models(config: Config) -> Iterator[Finding]:
    for model in config.models:
        name = f"model {model.profile}"
        try:
            files = check_model_folder(load_profile(model.profile), model.path)
        except ValueError as error:
            yield Finding(name, "fail", str(error), "correct `profile` in [[models]]")
        except ModelFolderError as error:
            yield Finding(name, "fail", str(error), "put the file there, or correct `path` in [[models]]")
        else:
            count = sum(len(paths) for paths in files.paths.values())
            yield Finding(name, "ok", f"{model.path}: {count} files are whole")


def _broker(config: Config) -> Iterator[Finding]:
    try:
        facts = broker_facts(config.broker)
    except CredentialsError as error:
        yield Finding("broker", "fail", str(error), "correct the user, password and virtual host of broker.url")
        return
    except BrokerUnavailableError as error:
        yield Finding("broker", "fail", str(error), "start the broker, or correct host and port in broker.url")
        return
    except FatalError as error:
        yield Finding("broker", "fail", str(error), "correct [broker] in the configuration")
        return
    yield Finding("broker", "ok", f"{facts.address}: {facts.product} {facts.version}")
    yield _topology(config)
    yield _consumer_timeout(config)


def _topology(config: Config) -> Finding:
    topology = topology_of(config)
    try:
        differences = check_on(config.broker, topology)
    except (BrokerUnavailableError, FatalError) as error:
        return Finding("topology", "fail", str(error), "look at the broker's log")
    if not differences:
        return Finding("topology", "ok", f"{len(topology.queues())} queues and {len(topology.exchanges())} exchanges")
    text = "\n".join(difference.text for difference in differences)
    if all(difference.text.startswith("-") for difference in differences):
        state: State = "warn" if config.topology.apply else "fail"
        return Finding("topology", state, text, "`reeld topology apply` (or topology.apply = true) declares them")
    return Finding("topology", "fail", text, "delete what differs once it is empty, then `reeld topology apply`")


def _consumer_timeout(config: Config) -> Finding:
    # A prefetched job waits, unacked, for the one before it: both times count against the broker's timeout.
    held = config.limits.time_limit_seconds * config.broker.prefetch_count
    sum_ = f"limits.time_limit_seconds {config.limits.time_limit_seconds:g} x broker.prefetch_count"
    text = (
        f"the broker's consumer_timeout cannot be asked over AMQP; its default is"
        f" {_CONSUMER_TIMEOUT_DEFAULT_SECONDS} s, and a job may be held {held:g} s"
        f" ({sum_} {config.broker.prefetch_count})"
    )
    if held < _CONSUMER_TIMEOUT_DEFAULT_SECONDS:
        return Finding("consumer timeout", "ok", text)
    return Finding(
        "consumer timeout",
        "warn",
        text,
        f"see that the broker has consumer_timeout = {round(held * 1000) + 60_000} or more in rabbitmq.conf,"
        " or lower the time limit",
    )


def _directory(name: str, directory: Path) -> Finding:
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".reeld-doctor-"):
            pass
    except OSError as error:
        fix = f"create it for the worker's user: sudo install -d -o USER {directory}"
        return Finding(name, "fail", f"{directory}: cannot write to {place}: {error.strerror}", fix)
    free = shutil.disk_usage(place).free
    text = f"{directory}: {free / 2**30:.1f} GiB free" + ("" if place == directory else " (will be created)")
    if free < _FREE_DISK_BYTES:
        return Finding(name, "warn", text, "make room, or move the directory")
    return Finding(name, "ok", text)


def _machine(config: Config | None, *, with_torch: bool) -> Iterator[Finding]:
    yield _ffmpeg()
    yield _nvidia(config)
    if with_torch:
        yield _torch(config)


def _ffmpeg() -> Finding:
    import imageio_ffmpeg  # here, because it imports numpy

    fix = "install imageio-ffmpeg again, or set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264"
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        version = _output([program, "-version"]).splitlines()[0]
        encoders = _output([program, "-hide_banner", "-encoders"])
    except (RuntimeError, OSError, subprocess.SubprocessError, IndexError) as error:
        return Finding("ffmpeg", "fail", str(error), fix)
    if "libx264" not in encoders:
        return Finding("ffmpeg", "fail", f"{program} has no libx264 encoder", fix)
    return Finding("ffmpeg", "ok", f"{version.split(' Copyright')[0]} ({program})")


def _nvidia(config: Config | None) -> Finding:
    wanted = config is not None and config.device == "cuda"
    program = shutil.which("nvidia-smi")
    if program is None:
        fix = "install the NVIDIA driver, or set device = 'cpu'" if wanted else ""
        return Finding("GPU", "fail" if wanted else "ok", "no nvidia-smi: the worker runs on the CPU", fix)
    try:
        listed = _output([program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("GPU", "fail" if wanted else "warn", f"nvidia-smi: {error}", "mend the NVIDIA driver")
    return Finding("GPU", "ok", listed.strip() or "nvidia-smi lists none")


def _torch(config: Config | None) -> Finding:
    try:
        found = json.loads(_output([sys.executable, "-c", _TORCH_QUESTION], timeout_seconds=120))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Finding("torch", "fail", f"torch does not start: {error}", "install reeld again: `make install`")
    names = ", ".join(found["names"]) or "no GPU"
    text = f"torch {found['version']}, CUDA {found['cuda']}: {names}"
    if not found["names"] and config is not None and config.device == "cuda":
        return Finding(
            "torch", "fail", text, "the driver and torch's CUDA do not fit, or CUDA_VISIBLE_DEVICES is empty"
        )
    return Finding("torch", "ok", text)


def _output(command: list[str], *, timeout_seconds: float = 20) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout_seconds,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    return done.stdout
