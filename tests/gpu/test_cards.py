"""What only cards can show: what the doctor finds, that idle ones are idle, and memory that really runs out.

The rows of the fault table run on GPUs as they are, with TEST_DEVICE=cuda (`benchmarks/gpu/run.sh daemon`).
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.private_broker import PrivateBroker
from tests.harness import Ear, Seen, Worker, fresh_vhost, idle, job, publish, write_config


class _Running:
    def __init__(self, worker: Worker, ear: Ear, url: str, config: Path) -> None:
        self.worker, self.ear, self.url, self.config = worker, ear, url, config

    def do(self, message: dict[str, Any]) -> Seen:
        publish(self.url, message)
        return self.ear.terminal(message["job_id"], worker=self.worker, timeout=240)


@pytest.fixture(scope="module")
def cards() -> int:
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    return len(listed.stdout.splitlines())


@pytest.fixture(scope="module")
def running(
    cards: int, broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_Running]:
    """A worker on every card, for all tests here."""
    folder = tmp_path_factory.mktemp("cards")
    with fresh_vhost(broker) as url:
        ear = Ear(url)
        config = write_config(folder, models, nproc=cards)
        worker = Worker(config, url, folder)
        try:
            ear.wait(idle, worker=worker, timeout=240)
            yield _Running(worker, ear, url, config)
        finally:
            worker.end()
            ear.close()


def _utilisation() -> list[int]:
    asked = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()]


def test_ranks_are_forked(running: _Running) -> None:
    """What ranks are forked from has not used CUDA, or they would have started anew, each on its own."""
    assert not [line for line in running.worker.logs() if line["event"] in ("cuda_forked", "ranks_start_alone")]


def test_the_doctor_finds_the_cards(running: _Running, cards: int) -> None:
    """Beside a running worker: every card, torch's CUDA, NCCL and a kernel for attention, and nothing to mend."""
    command = [sys.executable, "-m", "ops.cli", "doctor", "--torch", "--config", str(running.config)]
    environment = {**os.environ, "REELD_AMQP_URL": running.url, "COLUMNS": "200"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(said.stdout)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("MiB used, driver") == cards
    for found in ("torch 2.", "NCCL 2.", "runs in bfloat16"):
        assert found in said.stdout


def test_idle_cards_do_not_spin(running: _Running, cards: int) -> None:
    """Between jobs no card works, though every rank waits for a command; after more than a minute the next is done."""
    assert running.do(job()).name == "succeeded"
    samples = []
    for _ in range(33):
        time.sleep(2)  # the time without a job is what is tested
        samples.append(_utilisation())
    busiest = [statistics.median(sample[card] for sample in samples) for card in range(cards)]
    print("median utilisation of each card while idle, in percent:", busiest)
    assert max(busiest) <= 5
    assert running.do(job()).name == "succeeded"


def test_memory_that_really_runs_out(running: _Running) -> None:
    """Another program takes the memory of the first card, where all frames come together: the job that no longer fits
    fails as `out_of_memory`, and once the memory is free again the next one is done, by the same worker."""
    large = job(parameters={"seed": 7, "height": 720, "width": 1280, "num_frames": 161, "num_inference_steps": 2})
    hog = subprocess.Popen([sys.executable, "-c", _HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert hog.stdout is not None
    assert hog.stdin is not None
    try:
        assert hog.stdout.readline() == "taken\n"
        failed = running.do(large)
    finally:
        hog.stdin.close()
        hog.wait(60)
    print("out of memory:", failed.data)
    assert (failed.name, failed.data["code"]) == ("failed", "out_of_memory")
    assert running.do(job()).name == "succeeded"


_HOG = """
import sys, torch
torch.zeros(1, device="cuda")
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - (64 << 20), dtype=torch.uint8, device="cuda")
print("taken", flush=True)
sys.stdin.read()
"""


def test_drain(running: _Running) -> None:
    """SIGTERM in mid-job: the job is finished, exit 0. The last test of its worker."""
    message = job(parameters={"seed": 7, "height": 128, "width": 192, "num_frames": 33, "num_inference_steps": 100})
    publish(running.url, message)
    key = f"job.{message['job_id']}.started"
    running.ear.wait(lambda seen: seen.routing_key == key, worker=running.worker)
    assert running.worker.drain(120) == 0, running.worker.tail()
    assert running.ear.terminal(message["job_id"]).name == "succeeded"
