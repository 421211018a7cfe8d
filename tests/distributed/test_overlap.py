"""With a second delivery in hand, the next job is generated while the last one is encoded."""

import os
from pathlib import Path

import imageio_ffmpeg
import pytest

from ops.private_broker import PrivateBroker
from tests.harness import Ear, Worker, fresh_vhost, idle, job, publish, write_config


def test_the_next_job_is_generated_while_the_last_is_encoded(
    broker: PrivateBroker, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `prefetch_count` 2 a job is done on every rank while the encoder of the one before has not begun.

    The encoder is the real one behind a gate, a FIFO that the test opens: no clock decides.
    """
    gate, encoder = tmp_path / "gate", tmp_path / "gated-ffmpeg"
    os.mkfifo(gate)
    encoder.write_text(
        f'#!/bin/sh\n[ -p {gate} ] && cat {gate} >/dev/null\nexec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n'
    )
    encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))
    config = write_config(tmp_path, models, nproc=1, extra="[broker]\nprefetch_count = 2")
    first, second = job(), job()
    with fresh_vhost(broker) as url:
        ear = Ear(url)
        worker = Worker(config, url, tmp_path)
        try:
            ear.wait(idle, worker=worker)
            publish(url, first)
            publish(url, second)
            ear.wait(lambda seen: seen.routing_key == f"job.{second['job_id']}.started", worker=worker)
            ear.wait(idle, after=ear.count, worker=worker)
            assert [ear.all(job_id=each["job_id"], name="succeeded") for each in (first, second)] == [[], []]
            with gate.open("w"):  # opens once the encoder reads it
                gate.unlink()
            ear.terminal(second["job_id"], worker=worker)
            done = [seen.routing_key for seen in ear.all(name="succeeded")]
            assert done == [f"job.{each['job_id']}.succeeded" for each in (first, second)]
        finally:
            worker.end()
            ear.close()
