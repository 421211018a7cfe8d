"""`reeld demo`: the whole path with everything real, on a machine with nothing prepared.

Owns the course of the demo. Leaves out every part that it uses: the jobs and the checks of their ends
(`ops.demo_jobs`), the broker (`ops.private_broker`), the worker (`ops.worker_process`), the tiny model, AMQP.
"""

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from daemon.broker_url import redacted
from daemon.client import (
    EventStream,
    ReceivedEvent,
    apply_on,
    delete_on,
    publish_job,
)
from daemon.config import load_config
from daemon.events import TERMINAL
from daemon.sections import BrokerConfig
from daemon.topology import Topology, topology_of
from ops import tiny_model
from ops.demo_jobs import DemoJob, demo_jobs, show_dead_letter, show_video
from ops.failure import CommandFailedError
from ops.private_broker import PrivateBroker
from ops.progress import job_display
from ops.worker_process import WorkerProcess

POOL = "demo"
_START_SECONDS = 120
_JOBS_SECONDS = 300
_STOP_SECONDS = 60
_NUM_HEADS = 12  # of the tiny models: the number of ranks must divide it


def demo(directory: Path, *, keep: bool = False) -> None:
    """Runs the demo in `directory`. Raises CommandFailedError when anything is not as it should be."""
    console = Console(highlight=False)
    # SIGTERM ends the demo like Ctrl-C: in order, with everything stopped.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    url = os.environ.get("REELD_AMQP_URL")
    # The demo's configuration is its own: no other setting of the environment may change it.
    for name in [name for name in os.environ if name.startswith("REELD_")]:
        del os.environ[name]
    try:
        _demo(directory.resolve(), console, given_url=url, keep=keep)
    except KeyboardInterrupt:
        raise CommandFailedError("interrupted; everything was stopped") from None
    except OSError as error:
        raise CommandFailedError(f"{error.filename or directory}: {error.strerror or error}") from error


def _demo(directory: Path, console: Console, *, given_url: str | None, keep: bool) -> None:
    begun = time.monotonic()
    _make_folders(directory)
    worker_id = f"demo-{secrets.token_hex(3)}"
    with ExitStack() as stack:
        # The model is written in a process of its own: it needs torch, and the broker starts meanwhile.
        writer = _start_model_writer(directory / "model")
        stack.callback(_end, writer)
        url = given_url or _private_broker_url(directory, stack)
        origin = "REELD_AMQP_URL" if given_url else "RabbitMQ of our own"
        console.print(f"broker    {redacted(url)} ({origin})")
        _finish_model_writer(writer, directory / "model", console)
        config_path = _write_config(directory, url, worker_id)
        config = load_config(config_path)
        topology = topology_of(config)
        if given_url:  # a private broker takes its queues with it
            stack.callback(delete_on, config.broker, topology)
        _apply(config.broker, topology, console)
        stream = stack.enter_context(
            EventStream(config.broker, [f"worker.{worker_id}.heartbeat", "job.#"]),
        )
        worker = stack.enter_context(
            WorkerProcess(config_path, directory / "reeld.log", environment={"OMP_NUM_THREADS": "1"})
        )
        world_size = _wait_until_idle(stream, worker)
        console.print(f"worker    [green]ready[/], {world_size} ranks on {config.device}; log {worker.log_path}")
        jobs = demo_jobs(directory)
        ends = _publish_and_follow(jobs, config.broker, stream, worker, console)
        for job in jobs:
            console.print()
            if job.fault is None:
                show_video(job, ends[job.job_id], directory, console)
            else:
                show_dead_letter(job, ends[job.job_id], config.broker, topology, console)
        console.print()
        if keep:
            _keep(worker, url, config.broker.prefix, config_path, console)
        status = worker.stop(timeout_seconds=_STOP_SECONDS)
        if status != 0:
            raise CommandFailedError(f"the worker ended with {status}, not 0; the end of its log:\n{worker.tail()}")
        console.print("worker    drained and stopped with exit status 0")
    if not keep:
        console.print(f"[bold green]all as it should be[/], in {time.monotonic() - begun:.0f} s")


def _make_folders(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("broker", "work", "output", "inputs"):
        shutil.rmtree(directory / name, ignore_errors=True)
        (directory / name).mkdir()


def _start_model_writer(folder: Path) -> subprocess.Popen[str] | None:
    if tiny_model.is_there(folder):
        return None
    return subprocess.Popen(
        [sys.executable, "-m", "ops.cli", "tiny-model", str(folder)],
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish_model_writer(writer: subprocess.Popen[str] | None, folder: Path, console: Console) -> None:
    if writer is None:
        console.print(f"model     {folder} (was there already)")
        return
    said, _ = writer.communicate(timeout=_START_SECONDS)
    if writer.returncode != 0:
        raise CommandFailedError(f"writing the tiny model failed:\n{said}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"model     {folder}, {size / 2**20:.1f} MiB of random weights in Wan's layout")


def _end(process: subprocess.Popen[str] | None) -> None:
    if process is not None and process.poll() is None:
        process.kill()
        process.wait()


def _private_broker_url(directory: Path, stack: ExitStack) -> str:
    with Console().status("starting a private RabbitMQ on loopback, writing the model"):
        broker = PrivateBroker(directory / "broker", plugins=())
        broker.start()
    stack.callback(shutil.rmtree, directory / "broker", ignore_errors=True)
    stack.callback(broker.stop)
    return broker.amqp_url


def _write_config(directory: Path, url: str, worker_id: str) -> Path:
    ranks = _number_of_ranks()
    settings: dict[str, Any] = {
        "pool": POOL,
        "worker_id": worker_id,
        "nproc_per_node": ranks or 2,
        "device": "cuda" if ranks else "cpu",
        "dtype": "float32",
        "heartbeat_seconds": 1,
        "work_directory": str(directory / "work"),
        # A prefix of its own: REELD_AMQP_URL may be a broker that others use.
        "broker": {"prefix": f"reeld-{worker_id}"},
        "topology": {"apply": True},
        "inputs": {"schemes": ["file"], "roots": [str(directory / "inputs")]},
        "output": {"directory": str(directory / "output")},
        "log": {"format": "json"},
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if not isinstance(value, dict)]
    for name, table in settings.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    for profile in tiny_model.NAMES:
        folder = json.dumps(str(directory / "model" / profile))
        lines += ["", "[[models]]", f'profile = "{profile}"', f"path = {folder}"]
    # The URL holds a password: in a file that only its owner may read.
    secret = directory / "amqp-url"
    secret.touch(mode=0o600)
    secret.write_text(url)
    at = lines.index("[broker]") + 1
    lines.insert(at, f"url_file = {json.dumps(str(secret))}")
    path = directory / "reeld.toml"
    path.write_text("\n".join([*lines, ""]))
    return path


def _number_of_ranks() -> int:
    """One rank a GPU, as far as the model's heads divide; 0 without GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([word for word in visible.split(",") if word.strip() not in ("", "-1")])
    else:
        count = 0
        if shutil.which("nvidia-smi"):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=20)
            count = len([line for line in listed.stdout.splitlines() if line.startswith("GPU ")])
    return max((n for n in range(1, count + 1) if _NUM_HEADS % n == 0), default=0)


def _apply(broker: BrokerConfig, topology: Topology, console: Console) -> None:
    differences = apply_on(broker, topology)
    if differences:
        raise CommandFailedError("\n".join(difference.text for difference in differences))
    console.print(f"topology  {len(topology.exchanges())} exchanges, {len(topology.queues())} queues applied")


def _wait_until_idle(stream: EventStream, worker: WorkerProcess) -> int:
    """Waits for the first heartbeat that says idle and returns the number of ranks."""
    deadline = time.monotonic() + _START_SECONDS
    with Console().status("starting the worker: torchrun, two ranks, loading the models"):
        while time.monotonic() < deadline:
            event = stream.next(0.5)
            if event is not None and event.name == "heartbeat" and event.data.get("state") == "idle":
                return len(event.data.get("ranks") or [])
            worker.check_alive()
    raise CommandFailedError(f"no worker was ready in {_START_SECONDS} s; the end of its log:\n{worker.tail()}")


def _publish_and_follow(
    jobs: list[DemoJob], broker: BrokerConfig, stream: EventStream, worker: WorkerProcess, console: Console
) -> dict[str, ReceivedEvent]:
    """Publishes every job and shows progress until each has its terminal event."""
    ends: dict[str, ReceivedEvent] = {}
    width = max(len(job.label) for job in jobs)
    deadline = time.monotonic() + _JOBS_SECONDS
    console.print()
    with job_display(console) as display:
        for job in jobs:
            display.add(job.job_id, job.label.ljust(width))
            publish_job(broker, pool=POOL, body=job.body, message_id=job.job_id)
        while len(ends) < len(jobs):
            if time.monotonic() > deadline:
                raise CommandFailedError(f"jobs not done in {_JOBS_SECONDS} s; the worker's log:\n{worker.tail()}")
            worker.check_alive()
            event = stream.next(0.5)
            if event is None:
                continue
            display.show(event)
            job_id = event.data.get("job_id")
            if event.is_job and event.name in TERMINAL and any(job.job_id == job_id for job in jobs):
                ends.setdefault(str(job_id), event)
    return ends


def _keep(worker: WorkerProcess, url: str, prefix: str, config_path: Path, console: Console) -> None:
    """Leaves broker and worker running until Ctrl-C."""
    reeld = shlex.quote(str(Path(sys.executable).with_name("reeld")))  # seldom in another terminal's PATH
    there = f"--url {shlex.quote(url)} --prefix {prefix}"
    console.print("broker and worker keep running; Ctrl-C stops them. In another terminal:\n")
    console.print(
        f"  {reeld} submit {there} --pool {POOL} --task text_to_video --prompt 'a red fox' --wait\n"
        f"  {reeld} watch {there}\n"
        f"  {reeld} doctor --config {shlex.quote(str(config_path))}\n",
        markup=False,
        soft_wrap=True,
    )
    try:
        while True:
            worker.check_alive()
            time.sleep(0.5)
    except KeyboardInterrupt:
        console.print("\nstopping")
