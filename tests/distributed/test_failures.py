"""What bad input gets, from the process's point of view: one line, an exit status, never a traceback loop."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file, save_file

from ops.private_broker import free_ports
from tests.harness import Ear, Worker, idle, job, publish, take, write_config

REELD = str(Path(sys.executable).parent / "reeld")


def _run(config: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [REELD, "run", "--config", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def own_models(models: Path, tmp_path: Path) -> Path:
    """A copy of the models that a test may damage."""
    return Path(shutil.copytree(models, tmp_path / "models"))


@pytest.mark.parametrize("fault", ["missing", "truncated", "wrong", "corrupt", "wrong-shaped"])
def test_row_30_bad_model_file(own_models: Path, tmp_path: Path, fault: str) -> None:
    """A missing, truncated, corrupt, wrong or wrong-shaped shard ends `reeld run` with one line that names it, and exit
    78, before any rank starts."""
    file = own_models / "tiny-i2v" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    match fault:
        case "missing":
            file.unlink()
        case "truncated":
            with file.open("r+b") as opened:
                opened.truncate(file.stat().st_size - 100)
        case "wrong":
            shutil.copy(own_models / "tiny-i2v" / "diffusion_pytorch_model-00001-of-00003.safetensors", file)
        case "corrupt":
            with file.open("r+b") as opened:
                opened.write(b"\xff" * 64)
        case "wrong-shaped":
            tensors = load_file(file)
            name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
            save_file({**tensors, name: tensors[name].T.copy()[:-1]}, file)
    done = _run(write_config(tmp_path, own_models, nproc=2))
    assert done.returncode == 78
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1, lines
    assert str(own_models / "tiny-i2v") in lines[0]
    assert file.name in lines[0] or fault == "wrong-shaped", lines  # then all shards together are wrong


def test_check_validates_and_stops(models: Path, tmp_path: Path) -> None:
    """`reeld run --check` says that all is well and exits 0 without a broker."""
    config = write_config(tmp_path, models, nproc=2)
    done = _run(config, "--check")
    assert done.returncode == 0, done.stderr
    assert "valid" in done.stdout


def test_every_configuration_fault_at_once(tmp_path: Path) -> None:
    """All faults of a configuration are listed in one go, with exit 78."""
    config = tmp_path / "bad.toml"
    config.write_text('pol = "x"\n[broker]\nurl = "http://x"\nheartbeat_seconds = 1\n')
    done = _run(config)
    assert done.returncode == 78
    for field in ("broker.url", "broker.heartbeat_seconds", "models", "pol"):
        assert field in done.stderr


def test_row_16_job_that_always_kills_its_only_rank(vhost: str, models: Path, tmp_path: Path) -> None:
    """A job that took a process down as often as the delivery limit allows is dead-lettered with its reason."""
    config = write_config(tmp_path, models, nproc=1, topology="delivery_limit = 1")
    ear = Ear(vhost)
    worker = Worker(config, vhost, tmp_path)
    try:
        ear.wait(idle, worker=worker)
        message = job(parameters={"seed": 1, "num_frames": 33, "num_inference_steps": 100})
        publish(vhost, message)
        ear.wait(lambda seen: seen.name == "progress" and seen.data["phase"] == "denoise", worker=worker)
        rank0 = next(line["pid"] for line in worker.logs() if line["rank"] == 0)
        os.kill(rank0, signal.SIGKILL)
        failed = ear.terminal(message["job_id"], worker=worker)
        assert (failed.name, failed.data["code"]) == ("failed", "worker_lost")
        letters = take(vhost, "reeld.jobs.test.dead")
        assert [properties.headers["x-reeld-code"] for properties, _ in letters] == ["worker_lost"]
        other = job()
        publish(vhost, other)
        assert ear.terminal(other["job_id"], worker=worker).name == "succeeded"
    finally:
        worker.end()
        ear.close()


def test_ranks_die_with_a_killed_launcher(vhost: str, models: Path, tmp_path: Path) -> None:
    """`kill -9` of the launcher leaves no rank behind that would hold a GPU."""
    ear = Ear(vhost)
    worker = Worker(write_config(tmp_path, models, nproc=2), vhost, tmp_path)
    try:
        ear.wait(idle, worker=worker)
        ranks = [psutil.Process(pid) for pid in {line["pid"] for line in worker.logs() if line["rank"] is not None}]
        assert len(ranks) == 2
        worker.process.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=20)
        assert not alive, alive
        assert len(gone) == 2
    finally:
        worker.end()
        ear.close()


@pytest.mark.parametrize("event", ["starting_ranks", "joined", "model_loaded"])
def test_row_25_sigterm_while_starting(vhost: str, models: Path, tmp_path: Path, event: str) -> None:
    """SIGTERM before anything is consumed ends the daemon at once, with exit 0, whatever it was loading."""
    worker = Worker(write_config(tmp_path, models, nproc=2), vhost, tmp_path)
    try:
        worker.wait_log(event)
        assert worker.drain() == 0, worker.tail()
        assert not [line for line in worker.logs() if "exception" in line]
    finally:
        worker.end()


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (2, 1)])
def test_bare_torchrun_runs_the_same_ranks(vhost: str, models: Path, tmp_path: Path, nodes: int, ranks: int) -> None:
    """`torchrun --nnodes M --nproc-per-node N -m daemon` on each of M nodes serves jobs, and drains on SIGTERM."""
    config = write_config(tmp_path, models, nproc=1)
    torchrun = str(Path(sys.executable).parent / "torchrun")
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    command = [torchrun, "--nnodes", str(nodes), "--nproc-per-node", str(ranks), "--local-addr", "127.0.0.1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "-m", "daemon"]
    ear = Ear(vhost)
    workers = [Worker(config, vhost, tmp_path, command=command) for _ in range(nodes)]
    try:
        ear.wait(idle, worker=workers[0])
        message = job()
        publish(vhost, message)
        seen = ear.terminal(message["job_id"], worker=workers[0])
        assert seen.name == "succeeded"
        assert len(ear.all(name="heartbeat")[-1].data["ranks"]) == nodes * ranks
        for worker in workers:
            worker.process.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.process.wait(60)
        ours = [json.loads(line) for worker in workers for line in worker.lines() if line.startswith("{")]
        assert {line["rank"] for line in ours if line["event"] == "left"} == set(range(nodes * ranks))
    finally:
        for worker in workers:
            worker.end()
        ear.close()
