"""`reeld support-bundle`: what somebody else needs to understand a fault, in one archive, with the secrets removed.

Owns what is gathered. Everything passes `ops.redaction` on its way in, and nothing is copied unread. What cannot be
gathered is said in the archive and does not end it. Leaves out sending it anywhere.
"""

import io
import json
import os
import platform
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

from daemon import __version__
from daemon.client import EventStream, check_on
from daemon.config import Config, load_config
from daemon.errors import ConfigError, ReeldError
from daemon.topology import topology_of
from ops.doctor import examine
from ops.finding import output_of
from ops.fleet import Fleet, hear
from ops.local_daemons import find_daemons
from ops.redaction import REMOVED, Redactor, known_secrets
from ops.stacks import collect, text
from ops.top_frame import document

_LOG_BYTES = 5 * 1024 * 1024
_JOURNAL_LINES = 20_000
_HEAR_SECONDS = 15.0
# Variables that say how reeld and its libraries run. No other is read.
_VARIABLES = ("REELD_", "CUDA_", "NCCL_", "TORCH", "PYTORCH_", "OMP_", "MKL_", "TORCHINDUCTOR_", "TRITON_", "GLOO_")
_VARIABLE_NAMES = ("PATH", "LANG", "LC_ALL", "TZ", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH", "PYTHONSAFEPATH")
_README = """A support bundle of reeld {version}, made on {host} at {time}.

In it: versions, the configuration as it was understood, `reeld doctor`, the topology and how the broker differs, one
frame of `reeld top`, the stacks of the daemons on this box, its log files and journal, nvidia-smi, and the variables
that say how reeld runs. Names of hosts, workers, pools, files and jobs are in it; prompts are where a log has them.

Removed: passwords and whatever looks like a secret, as {removed}. Never read: the contents of broker.url_file but for
its password, in order to remove it; keys and certificates; variables not named like reeld's, CUDA's or torch's.
Look through it before you pass it on.
"""


class _Bundle:
    """The archive being written. `add` and `add_json` are the only ways in."""

    def __init__(self, archive: tarfile.TarFile, folder: str, redactor: Redactor) -> None:
        self._archive = archive
        self._folder = folder
        self._redactor = redactor
        self.failures: list[str] = []

    def add(self, name: str, content: str) -> None:
        self._write(name, self._redactor.clean(content))

    def add_json(self, name: str, content: object) -> None:
        plain = json.loads(json.dumps(content, default=str))
        self._write(name, json.dumps(self._redactor.clean_json(plain), indent=2, ensure_ascii=False))

    def _write(self, name: str, content: str) -> None:
        data = content.encode("utf-8", "backslashreplace")
        member = tarfile.TarInfo(f"{self._folder}/{self._redactor.clean(name)}")
        member.size, member.mtime, member.mode = len(data), int(time.time()), 0o600
        self._archive.addfile(member, io.BytesIO(data))

    def gather(self, what: str, work: Callable[[], None]) -> None:
        """Does one part; its failure is noted."""
        try:
            work()
        except (ReeldError, OSError, subprocess.SubprocessError, psutil.Error, ValueError) as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")


def support_bundle(config_path: Path | None, output: Path | None, *, since: str, with_torch: bool) -> Path:
    """Writes the archive, readable by its owner alone. Returns its path."""
    try:
        config: Config | None = load_config(config_path)
    except ConfigError as error:
        config, fault = None, str(error)
    else:
        fault = ""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    folder = f"reeld-support-{socket.gethostname()}-{stamp}"
    path = output or Path(f"{folder}.tar.gz")
    redactor = Redactor(known_secrets(config.broker if config is not None else None))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        bundle = _Bundle(archive, folder, redactor)
        about = {"version": __version__, "host": platform.node(), "time": stamp, "removed": REMOVED}
        bundle.add("README.txt", _README.format(**about))
        _add_all(bundle, config, config_path, fault, since=since, with_torch=with_torch)
        bundle.add("not-gathered.txt", "\n".join(bundle.failures) or "everything was gathered")
    return path


def _add_all(
    bundle: _Bundle, config: Config | None, config_path: Path | None, fault: str, *, since: str, with_torch: bool
) -> None:
    bundle.gather("versions", lambda: bundle.add_json("versions.json", _versions()))
    if config is not None:
        bundle.add_json("configuration.json", {"file": str(config_path or ""), **config.model_dump(mode="json")})
    else:
        bundle.add("configuration-faults.txt", fault)
    bundle.gather("doctor", lambda: bundle.add_json("doctor.json", _findings(config_path, with_torch=with_torch)))
    if config is not None:
        bundle.gather("topology", lambda: bundle.add("topology.txt", _topology(config)))
        bundle.gather("heartbeats", lambda: bundle.add_json("top.json", _heartbeats(config)))
        if config.log.directory is not None:
            _add_logs(bundle, config.log.directory)
    bundle.gather("stacks", lambda: _add_daemons(bundle))
    bundle.add_json("environment.json", _variables(os.environ))
    _add_programs(bundle, since)


def _findings(config_path: Path | None, *, with_torch: bool) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in examine(config_path, with_torch=with_torch)]


def _versions() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "reeld": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "packages": {each.name: each.version for each in sorted(distributions(), key=lambda each: each.name.lower())},
    }


def _topology(config: Config) -> str:
    topology = topology_of(config)
    differences = [each.text for each in check_on(config.broker, topology)]
    return "\n".join([*topology.plan_lines(), "", "differences:", *(differences or ["none"])])


def _heartbeats(config: Config) -> dict[str, Any]:
    fleet = Fleet()
    with EventStream(config.broker, ["#"]) as stream:
        hear(stream, fleet, timeout_seconds=_HEAR_SECONDS)
    return document(fleet, {}, time.monotonic())


def _add_daemons(bundle: _Bundle) -> None:
    daemons, hidden = find_daemons()
    if hidden:
        bundle.failures.append(f"stacks: {hidden} processes belong to others: try as root")
    for daemon in daemons:
        found = collect(daemon)
        bundle.add(f"daemon-{daemon.launcher.pid}/stacks.txt", "\n".join(text(found)))
        bundle.add_json(f"daemon-{daemon.launcher.pid}/ranks.json", {rank: daemon.pulse(rank) for rank in daemon.ranks})
        bundle.gather(
            f"environment of {daemon.launcher.pid}",
            lambda daemon=daemon: bundle.add_json(  # type: ignore[misc]  # bound now, because the loop goes on
                f"daemon-{daemon.launcher.pid}/environment.json", _variables(daemon.launcher.environ())
            ),
        )


def _add_logs(bundle: _Bundle, directory: Path) -> None:
    for path in sorted(directory.glob("*.jsonl")):
        bundle.gather(f"log {path}", lambda path=path: bundle.add(f"logs/{path.name}", _tail(path)))  # type: ignore[misc]


def _add_programs(bundle: _Bundle, since: str) -> None:
    if shutil.which("journalctl"):
        command = ["journalctl", "--no-pager", "-o", "short-iso-precise", "--since", since, "-n", str(_JOURNAL_LINES)]
        command += ["-u", "reeld*"]
        bundle.gather("journal", lambda: bundle.add("logs/journal.txt", output_of(command, timeout_seconds=60)))
    if shutil.which("nvidia-smi"):
        bundle.gather("nvidia-smi", lambda: bundle.add("nvidia-smi.txt", output_of(["nvidia-smi", "-q"])))
        matrix = ["nvidia-smi", "topo", "-m"]
        bundle.gather("nvidia-smi topo", lambda: bundle.add("nvidia-smi-topo.txt", output_of(matrix)))


def _tail(path: Path) -> str:
    """The last lines of a log file, whole lines only."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_BYTES))
        if size > _LOG_BYTES:
            file.readline()
        return file.read().decode("utf-8", "backslashreplace")


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(_VARIABLES) or name in _VARIABLE_NAMES
    }
