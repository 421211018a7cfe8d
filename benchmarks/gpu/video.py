"""Whole videos through the daemon: a broker, `reeld run` on all GPUs, and jobs at a model's real shape.

    python -m benchmarks.gpu.video --profile wan2.1-t2v-1.3b --model FOLDER --ranks 2 --output FILE

The first job compiles; the others show what a job takes, phase by phase, and what each rank's memory came to. Leaves
OUTPUT as JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.real_worker import write_real_config
from ops.private_broker import PrivateBroker
from tests.harness import Ear, Worker, fresh_vhost, idle, job, publish


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="wan2.1-t2v-1.3b")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--memory", default="resident")
    parser.add_argument("--parallel", default="", help="of the configuration: 'ulysses_degree = 2'")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--shape", default="480x832x81")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    height, width, num_frames = map(int, options.shape.split("x"))
    report: dict[str, Any] = {**{name: str(value) for name, value in vars(options).items()}, "jobs": []}
    with tempfile.TemporaryDirectory() as scratch, PrivateBroker(Path(scratch) / "broker") as broker:
        folder = Path(scratch)
        config = write_real_config(
            folder, options.profile, options.model, ranks=options.ranks, device=options.device, memory=options.memory,
            parallel=options.parallel,
        )  # fmt: skip
        with fresh_vhost(broker) as url:
            ear = Ear(url)
            begun = time.monotonic()
            worker = Worker(config, url, folder)
            try:
                ear.wait(idle, worker=worker, timeout=240)
                report["seconds_until_ready"] = round(time.monotonic() - begun, 2)
                report["loading"] = [line for line in worker.logs() if line["event"] == "model_loaded"]
                for number in range(options.jobs):
                    parameters = {
                        "seed": number, "height": height, "width": width, "num_frames": num_frames,
                        "num_inference_steps": options.steps, "cfg_scale": 5.0,
                    }  # fmt: skip
                    message = job(prompt="a red fox runs through snow", parameters=parameters, output={"fps": 16})
                    report["jobs"].append(_run(message, url, ear, worker))
                    print(json.dumps(report["jobs"][-1]), flush=True)
                    options.output.write_text(json.dumps(report, indent=1))
                begun = time.monotonic()
                report["drain"] = {"exit_status": worker.drain(), "seconds": round(time.monotonic() - begun, 2)}
            finally:
                worker.end()
                ear.close()
                options.output.write_text(json.dumps(report, indent=1))
                options.output.with_suffix(".log").write_text(worker.log_path.read_text())


def _run(message: dict[str, Any], url: str, ear: Ear, worker: Worker) -> dict[str, Any]:
    beats = len(ear.all(name="heartbeat"))
    begun = time.monotonic()
    publish(url, message)
    end = ear.terminal(message["job_id"], worker=worker, timeout=300)
    seconds = time.monotonic() - begun
    used: dict[int, dict[str, int]] = {}
    for beat in ear.all(name="heartbeat")[beats:]:
        for rank in beat.data["ranks"]:
            known = used.setdefault(rank["rank"], {})
            for name, value in rank.items():
                if "memory" in name and isinstance(value, int):
                    known[name] = max(known.get(name, 0), value)
    return {
        "seconds": round(seconds, 2),
        "end": end.name,
        "data": end.data,
        "peak_memory_bytes": used,
    }


if __name__ == "__main__":
    main()
