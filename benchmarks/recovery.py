"""How long reeld takes to work again: after `kill -9` of a peer, and after a restart of its broker.

`make bench-recovery ARGS="--runs 20"`. Each recovery is measured beside the floor that it cannot beat, run by run, so
that both meet the same machine:

- a peer is killed in mid-denoising; recovered: the first denoising step of the same job, redelivered. Floor: as many
  processes as there are ranks start Python and load the same models through DiffSynth alone: no groups, no broker.
  With `--model` a real one, on GPUs: then a step has run before the ranks are ready, which the floor has not.
- a broker is killed and started again; recovered: the daemon consumes again. Floor: the broker's own start.

Where the time after a killed peer goes is taken from the worker's log lines. Prints Markdown, and writes it and JSON
into `--out`. Leaves out how the floors might be lowered.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.real_worker import write_real_config
from ops.private_broker import PrivateBroker
from tests.harness import Ear, Worker, idle, job, publish, write_config

_LOAD = """
import sys
from pathlib import Path
import torch
from diffsynth.core import ModelConfig
from diffsynth.pipelines.wan_video import WanVideoPipeline
from parallel.profile import check_model_folder, load_profile
from parallel.tiny_registry import register_tiny_models
register_tiny_models()
device, dtype, *folders = sys.argv[1:]
for folder in folders:
    files = check_model_folder(load_profile(Path(folder).name), Path(folder))
    WanVideoPipeline.from_pretrained(
        torch_dtype=getattr(torch, dtype), device=device, redirect_common_files=False,
        model_configs=[
            ModelConfig(path=[str(path) for path in paths] if len(paths) > 1 else str(paths[0]))
            for paths in files.paths.values()
        ],
        tokenizer_config=ModelConfig(path=str(files.tokenizer)),
    )
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What recovers: a worker's configuration, the models it serves, on what, and a job that is long enough."""

    config: Path
    folders: Sequence[Path]
    device: str
    dtype: str
    ranks: int
    parameters: Mapping[str, int]


# The log line that ends each stage of a recovery, on the last rank to write it.
_STAGES = {
    "group ended, started again": "starting_ranks",
    "Python, imports, joining": "joined",
    "models loaded": "ready",
    "consuming, redelivered": "job_started",
}


_FLOORS = {"peer": "process_floor", "broker": "broker_floor"}

# On every broker a kill soon after a declare may lose the queue.
_DECLARED_SECONDS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=("peer", "broker"), help="one of the two recoveries")
    parser.add_argument("--model", type=Path, help="a real model's folder, called as its profile; served on GPUs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no further peer is killed after so long")
    parser.add_argument("--out", type=Path, default=Path("recovery-output"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        subject = _subject(Path(folder), arguments.ranks, arguments.model)
        rows = _measure(Path(folder), subject, runs=arguments.runs, only=arguments.only, minutes=arguments.minutes)
    report = {
        "runs": {name: len(rows[name]) for name in ("peer", "broker")},
        "ranks": arguments.ranks,
        "models": [folder.name for folder in subject.folders],
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "seconds": rows,
        "stages_p50": _stages_p50(rows),
        "summary": {name: _summary(rows[name], rows[floor]) for name, floor in _FLOORS.items() if rows[name]},
    }
    text = _markdown(report)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "recovery.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "recovery.md").write_text(text)
    print(text)
    return 0


def _subject(folder: Path, ranks: int, model: Path | None) -> _Subject:
    if model is not None:
        return _Subject(
            config=write_real_config(folder, model.name, model, ranks=ranks, device="cuda"),
            folders=[model.resolve()],
            device="cuda",
            dtype="bfloat16",
            ranks=ranks,
            parameters={"num_frames": 81, "height": 480, "width": 832, "num_inference_steps": 20},
        )
    models = folder / "models"
    script = "import sys; from pathlib import Path; from parallel.tiny import write_tiny_model; "
    script += "write_tiny_model(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(models)], check=True, capture_output=True)
    return _Subject(
        config=write_config(folder, models, nproc=ranks, topology="delivery_limit = 100"),
        folders=[models / "tiny-t2v", models / "tiny-i2v"],
        device="cpu",
        dtype="float32",
        ranks=ranks,
        parameters={"num_frames": 33, "height": 128, "width": 192, "num_inference_steps": 25},
    )


def _measure(folder: Path, subject: _Subject, *, runs: int, only: str | None, minutes: float) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {"peer": [], "process_floor": [], "broker": [], "broker_floor": []}
    with PrivateBroker(folder / "broker") as broker:
        worker = Worker(subject.config, broker.amqp_url, folder)
        try:
            worker.wait_log("consuming", timeout=300)
            time.sleep(_DECLARED_SECONDS)
            for run in range(runs if only != "peer" else 0):
                floor, seconds = _restart_broker(worker, broker)
                rows["broker_floor"].append(floor)
                rows["broker"].append(seconds)
                print(f"broker {run + 1}/{runs}: {seconds:.2f} s, floor {floor:.2f} s", flush=True)
            ear = Ear(broker.amqp_url)
            ear.wait(idle, worker=worker)
            until = time.monotonic() + minutes * 60
            for run in range(runs if only != "broker" else 0):
                if time.monotonic() > until and run > 0:
                    break
                seconds, stages = _kill_peer(worker, ear, broker.amqp_url, subject)
                rows["peer"].append(seconds)
                for name, each in stages.items():
                    rows.setdefault(name, []).append(each)
                rows["process_floor"].append(_load_models(subject))
                print(
                    f"peer {run + 1}/{runs}: {rows['peer'][-1]:.2f} s, floor {rows['process_floor'][-1]:.2f} s",
                    flush=True,
                )
            ear.close()
            worker.drain()
        finally:
            worker.end()
    return rows


def _kill_peer(worker: Worker, ear: Ear, url: str, subject: _Subject) -> tuple[float, dict[str, float]]:
    """Seconds from the kill to the first step of the redelivered job, and how they are made up."""
    message = job(parameters={"seed": 1, **subject.parameters})
    key = f"job.{message['job_id']}.progress"
    publish(url, message)
    ear.wait(lambda seen: seen.routing_key == key and seen.data["phase"] == "denoise", worker=worker)
    count = ear.count
    peer = {line["rank"]: line["pid"] for line in worker.logs() if line["rank"] is not None}[subject.ranks - 1]
    killed = time.time()
    os.kill(peer, signal.SIGKILL)
    started = ear.wait(
        lambda seen: seen.routing_key == f"job.{message['job_id']}.started", after=count, worker=worker, timeout=300
    )
    number = next(n for n, seen in enumerate(ear.all()) if seen.event["id"] == started.event["id"])
    step = ear.wait(
        lambda seen: seen.routing_key == key and seen.data["phase"] == "denoise", after=number, worker=worker
    )
    ear.terminal(message["job_id"], worker=worker, timeout=300)
    stepped = _seconds(step.event["time"])
    stages, last = {}, killed
    for name, event in _STAGES.items():
        times = (_seconds(line["timestamp"]) for line in worker.logs() if line["event"] == event)
        end = max(at for at in times if killed < at <= stepped)
        stages[name], last = end - last, end
    return stepped - killed, {**stages, "text encoding, first step": stepped - last}


def _load_models(subject: _Subject) -> float:
    """Seconds in which as many processes start and load the models."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    processes = []
    for rank in range(subject.ranks):
        device = f"{subject.device}:{rank}" if subject.device == "cuda" else subject.device
        command = [sys.executable, "-c", _LOAD, device, subject.dtype, *map(str, subject.folders)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        processes.append(process)
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError("a process could not load the models")
    return time.monotonic() - begun


def _restart_broker(worker: Worker, broker: PrivateBroker) -> tuple[float, float]:
    """Seconds from the broker's start until it is ready, and until the daemon consumes again."""
    consuming = _count_consuming(worker)
    broker.kill()
    begun = time.time()
    broker.start()
    floor = time.time() - begun
    deadline = time.monotonic() + 300
    while _count_consuming(worker) == consuming:
        if worker.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(worker.tail())
        time.sleep(0.2)  # a growing file offers no event; what counts is the line's own time
    again = [line for line in worker.logs() if line["event"] == "consuming"][-1]
    time.sleep(_DECLARED_SECONDS)
    return floor, _seconds(again["timestamp"]) - begun


def _stages_p50(rows: dict[str, list[float]]) -> dict[str, float]:
    names = [*_STAGES, "text encoding, first step"]
    return {name: round(statistics.median(rows[name]), 2) for name in names if rows.get(name)}


def _count_consuming(worker: Worker) -> int:
    return sum('"consuming"' in line and '"event": "consuming"' in line for line in worker.lines())


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()


def _summary(seconds: list[float], floor: list[float]) -> dict[str, Any]:
    p50, floor_p50 = statistics.median(seconds), statistics.median(floor)
    return {
        "p50": round(p50, 2),
        "max": round(max(seconds), 2),
        "floor_p50": round(floor_p50, 2),
        "floor_max": round(max(floor), 2),
        "ratio_p50": round(p50 / floor_p50, 2),
    }


def _markdown(report: dict[str, Any]) -> str:
    names = {
        "peer": f"`kill -9` of a peer ({report['ranks']} ranks) to the next first step; floor: processes and models",
        "broker": "broker started again to consuming again; floor: broker start",
    }
    load = ", ".join(f"{each:.1f}" for each in report["load_average"])
    lines = [
        f"{report['cpus']} CPUs, load average at the end {load}.",
        "",
        "| recovery | runs | p50 s | max s | floor p50 s | floor max s | p50 / floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in report["summary"].items():
        figures = (row[figure] for figure in ("p50", "max", "floor_p50", "floor_max", "ratio_p50"))
        lines.append("| " + " | ".join(map(str, (names[key], report["runs"][key], *figures))) + " |")
    if report["stages_p50"]:
        lines += ["", "After a killed peer, p50 of each stage:", "", "| stage | seconds |", "|---|---|"]
        lines += [f"| {name} | {seconds} |" for name, seconds in report["stages_p50"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
