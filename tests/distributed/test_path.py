"""The whole path on 2 ranks: from a message in RabbitMQ to a video file, and what is seen meanwhile."""

import json
import re
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pika
import psutil
import pytest
from PIL import Image
from safetensors.numpy import load_file

from ops.private_broker import PrivateBroker
from tests.distributed.experts import write_loras
from tests.distributed.launch import run_reference
from tests.harness import Ear, Worker, fresh_vhost, idle, job, publish, take, write_config


class Running:
    """A worker of 2 ranks with everything around it."""

    def __init__(self, worker: Worker, ear: Ear, url: str, folder: Path) -> None:
        self.worker, self.ear, self.url, self.folder = worker, ear, url, folder

    def do(self, message: dict[str, Any], **properties: Any) -> dict[str, Any]:
        publish(self.url, message, **properties)
        return self.ear.terminal(message["job_id"], worker=self.worker).event

    def pids(self) -> dict[int, int]:
        return {line["rank"]: line["pid"] for line in self.worker.logs() if line["rank"] is not None}


@pytest.fixture(scope="module")
def running(broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("path")
    write_loras(folder / "loras")
    config = write_config(
        folder, models, nproc=2, topology="retry_delays_seconds = [1, 2]", extra="memory_limit_gib = 1"
    )
    loras = f'[[loras]]\nname = "styles"\npath = "{folder}/loras"\n'
    config.write_text(config.read_text() + loras + f'[log]\ndirectory = "{folder}/logs"\n')
    with fresh_vhost(broker) as url:
        ear = Ear(url)
        worker = Worker(config, url, folder)
        try:
            ear.wait(idle, worker=worker)
            yield Running(worker, ear, url, folder)
        finally:
            worker.end()
            ear.close()


def _decoded(video: dict[str, Any]) -> tuple[str, Any]:
    """What ffmpeg says of the stream, and its frames as (num_frames, height, width, 3) of uint8."""
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-i",
        video["path"],
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    found = re.search(r"Video: (.*?, (\d+)x(\d+)[ ,].*)", done.stderr.decode())
    assert found is not None
    width, height = int(found[2]), int(found[3])
    return found[1], np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def test_amqp_publish_makes_a_playable_video(running: Running, models: Path) -> None:
    """A job published by `amqp-publish` ends as an H.264 file of the frames asked for."""
    message = job(parameters={"seed": 3, "height": 64, "width": 96, "num_frames": 13, "num_inference_steps": 4})
    subprocess.run(
        ["amqp-publish", "-u", running.url, "-e", "reeld.jobs", "-r", "test", "-p", "-C", "application/json"],
        input=json.dumps(message).encode(),
        check=True,
        timeout=30,
    )
    event = running.ear.terminal(message["job_id"], worker=running.worker).event
    assert event["type"] == "reeld.job.succeeded", event
    video = event["data"]["result"]["video"]
    meta, frames = _decoded(video)
    assert "h264" in meta
    assert " 8 fps" in meta
    assert frames.shape == (13, 64, 96, 3)
    assert (video["num_frames"], video["width"], video["height"], video["fps"]) == (13, 96, 64, 8)

    reference = _reference(models / "tiny-t2v", message, running.folder)
    # yuv420p halves the colour's resolution, which these noisy frames show; brightness must come through.
    error = np.mean((_luma(frames) - _luma(reference)) ** 2)
    other = np.mean((_luma(np.roll(frames, 1, axis=0)) - _luma(reference)) ** 2)
    psnr = 10 * np.log10(255**2 / error)
    assert psnr > 32, psnr
    assert error < other / 10, "each frame is nearest to its own"


def _luma(frames: Any) -> Any:
    return frames.astype(float) @ np.array([0.299, 0.587, 0.114])


def _reference(folder: Path, message: dict[str, Any], work: Path) -> Any:
    arguments = {
        "prompt": message["prompt"],
        "negative_prompt": "",
        "cfg_scale": 5.0,
        "sigma_shift": 5.0,
        "tiled": False,
        **message["parameters"],
    }
    case = {"name": "one", "model_folder": str(folder), "dtype": "float32", "input_image": None}
    (work / "cases.json").write_text(json.dumps([{**case, "arguments": arguments}]))
    run_reference("reference", work / "cases.json", work / "reference.safetensors")
    frames = load_file(work / "reference.safetensors")["one"]
    return np.clip((frames + 1) * 127.5, 0, 255).astype(np.uint8)


def test_image_to_video_echoes_metadata_and_seed(running: Running) -> None:
    """An image-to-video job reports the seed that rank 0 drew, and its metadata unchanged."""
    image = running.folder / "first.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(image)
    message = job(
        task="image_to_video",
        inputs={"input_image": image.as_uri()},
        parameters={"num_frames": 9, "num_inference_steps": 3},
        metadata={"customer": "é", "n": [1, 2]},
    )
    event = running.do(message)
    assert event["type"] == "reeld.job.succeeded", event
    assert event["data"]["metadata"] == {"customer": "é", "n": [1, 2]}
    assert isinstance(event["data"]["result"]["plan"]["seed"], int)
    assert _decoded(event["data"]["result"]["video"])[1].shape == (9, 64, 96, 3)


def test_the_result_names_the_parameters_of_its_task(running: Running) -> None:
    """What a task alone takes is in its result as it was used, and not in another task's."""
    first = running.do(job())["data"]["result"]
    parameters = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 4, "denoising_strength": 0.7}
    again = job(task="video_to_video", inputs={"input_video": first["video"]["uri"]}, parameters=parameters)
    plan = running.do(again)["data"]["result"]["plan"]
    assert {name: plan[name] for name in parameters} == parameters
    assert plan.keys() - first["plan"].keys() == {"denoising_strength"}


def test_a_lora_is_for_one_job(running: Running) -> None:
    """A job's LoRA changes its video, the result names it, and the next job without it is as the one before it."""
    named = {"name": "styles/peft", "strength": 0.5}
    before, styled, after = (running.do(job(loras=loras)) for loras in ([], [named], []))
    results = [event["data"]["result"] for event in (before, styled, after)]
    assert [result["plan"]["loras"] for result in results] == [[], [{**named, "target": "both"}], []]
    assert results[0]["video"]["sha256"] == results[2]["video"]["sha256"] != results[1]["video"]["sha256"]


def test_events_come_in_order(running: Running) -> None:
    """accepted, started, progress and exactly one terminal event, each a CloudEvents 1.0 object."""
    message = job(parameters={"seed": 1, "num_frames": 9, "num_inference_steps": 12})
    running.do(message)
    seen = running.ear.all(job_id=message["job_id"])
    names = [each.name for each in seen]
    assert names[:2] == ["accepted", "started"]
    assert "progress" in names
    assert names.count("succeeded") == 1
    for each in seen:
        assert {"specversion", "id", "source", "type", "subject", "time", "data"} <= set(each.event)
        assert each.event["specversion"] == "1.0"
        assert each.event["subject"] == message["job_id"]


@pytest.mark.parametrize(
    ("changed", "code", "path"),
    [
        ({"parameters": {"num_frames": "many"}}, "malformed_job", "parameters.num_frames"),
        ({"surprise": 1}, "malformed_job", "surprise"),
        ({"schema": "reeld.job/9"}, "malformed_job", "schema"),
        ({"task": "image_to_video"}, "malformed_job", "inputs.input_image"),
        ({"parameters": {"height": 4096, "width": 4096}}, "malformed_job", "parameters.height"),
        ({"parameters": {"height": 1280, "width": 1280}}, "out_of_memory", "parameters"),
        ({"loras": [{"name": "styles/none"}]}, "input_rejected", "loras.0.name"),
    ],
)
def test_row_20_bad_job_is_never_broadcast(running: Running, changed: dict[str, Any], code: str, path: str) -> None:
    """A job that cannot be done is dead-lettered with code and path, told to its publisher, and never broadcast."""
    message = job(**changed)
    event = running.do(message)
    assert event["type"] == "reeld.job.failed"
    assert (event["data"]["code"], event["data"]["path"]) == (code, path)
    letters = [
        (properties, body)
        for properties, body in take(running.url, "reeld.jobs.test.dead")
        if json.loads(body)["job_id"] == message["job_id"]
    ]
    assert len(letters) == 1
    assert letters[0][0].headers["x-reeld-code"] == code
    assert letters[0][0].headers["x-reeld-path"] == path
    assert not running.ear.all(job_id=message["job_id"], name="started")  # which is said before the broadcast


def test_not_json_without_id_is_dead_lettered(running: Running) -> None:
    """Bytes that are no JSON and carry no id go to the dead-letter queue; the next job is done as ever."""
    publish(running.url, b"\xff\xfe{")
    assert running.do(job())["type"] == "reeld.job.succeeded"
    codes = [properties.headers["x-reeld-code"] for properties, _ in take(running.url, "reeld.jobs.test.dead")]
    assert codes == ["malformed_job"]


def test_same_message_twice_is_one_video(running: Running) -> None:
    """The same message delivered twice is generated once; the second time the same result is said again."""
    message = job()
    first = running.do(message)
    count = running.ear.count
    publish(running.url, message)
    again = running.ear.wait(
        lambda seen: seen.routing_key == f"job.{message['job_id']}.succeeded",
        after=count,
        worker=running.worker,
    ).event
    assert again["id"] == first["id"]
    assert again["data"]["result"] == first["data"]["result"]
    folder = Path(first["data"]["result"]["video"]["path"]).parent
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".mp4"]
    assert len(running.ear.all(job_id=message["job_id"], name="started")) == 1


def test_other_request_under_the_same_id_is_refused(running: Running) -> None:
    """A finished job_id with another request fails as job_id_conflict, and the first video stays."""
    message = job()
    video = running.do(message)["data"]["result"]["video"]
    count = running.ear.count
    publish(running.url, {**message, "prompt": "something else"})
    failed = running.ear.wait(
        lambda seen: seen.routing_key == f"job.{message['job_id']}.failed", after=count, worker=running.worker
    )
    assert failed.data["code"] == "job_id_conflict"
    assert Path(video["path"]).stat().st_size == video["bytes"]
    take(running.url, "reeld.jobs.test.dead")


def test_transient_failure_climbs_the_ladder(running: Running) -> None:
    """An input that is not there yet: retried in place, then over the ladder, and done once it is there."""
    image = running.folder / f"late-{uuid.uuid4().hex}.png"
    message = job(task="image_to_video", inputs={"input_image": image.as_uri()})
    publish(running.url, message)
    running.ear.wait(
        lambda seen: seen.routing_key == f"job.{message['job_id']}.retrying" and seen.data["delay_seconds"] == 1,
        worker=running.worker,
    )
    Image.new("RGB", (96, 64), "teal").save(image)
    event = running.ear.terminal(message["job_id"], worker=running.worker).event
    assert event["type"] == "reeld.job.succeeded", event
    assert event["data"]["attempt"] > 1


def _cancel(running: Running, message: dict[str, Any]) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(running.url))
    connection.channel().basic_publish("reeld.control", f"cancel.{message['job_id']}", b"")
    connection.close()


def _answer(running: Running, message: dict[str, Any], after: int) -> Any:
    key = f"job.{message['job_id']}.cancel_noted"
    return running.ear.wait(lambda seen: seen.routing_key == key, after=after, worker=running.worker).data


def _in_denoising(running: Running, message: dict[str, Any]) -> None:
    key = f"job.{message['job_id']}.progress"
    running.ear.wait(lambda seen: seen.routing_key == key and seen.data["phase"] == "denoise", worker=running.worker)


LONG = {"seed": 1, "num_frames": 33, "num_inference_steps": 200, "height": 128, "width": 192}


def test_row_27_cancel_of_a_running_and_of_a_queued_job(running: Running) -> None:
    """A cancel in mid-job ends it on all ranks with one `cancelled` event; a queued one is told of, and never starts;
    the next job is clean."""
    first, second = job(parameters=LONG), job(job_id=f"with.dots.{uuid.uuid4()}")
    publish(running.url, first)
    publish(running.url, second)
    _in_denoising(running, first)
    before = running.pids()
    count = running.ear.count
    _cancel(running, second)
    assert _answer(running, second, count)["state"] == "unknown", "it is still in the queue"
    _cancel(running, first)
    assert _answer(running, first, count)["state"] == "running"
    for message in (first, second):
        assert running.ear.terminal(message["job_id"], worker=running.worker).name == "cancelled"
    assert running.do(job())["type"] == "reeld.job.succeeded"
    assert [seen.name for seen in running.ear.all(job_id=second["job_id"])] == ["cancel_noted", "cancelled"]
    assert len(running.ear.all(job_id=first["job_id"], name="cancelled")) == 1
    assert running.pids() == before
    assert not take(running.url, "reeld.jobs.test.dead")


def test_row_27_cancel_of_an_unknown_job(running: Running) -> None:
    """The cancel of a job that nobody knows is answered; if the job comes later, it does not start."""
    message = job()
    count = running.ear.count
    _cancel(running, message)
    answer = _answer(running, message, count)
    assert (answer["state"], answer["worker_id"]) == ("unknown", "tester")
    assert answer["remembered_seconds"] > 3600
    assert running.do(message)["type"] == "reeld.job.cancelled"
    assert not running.ear.all(job_id=message["job_id"], name="started")


@pytest.mark.parametrize("moment", ["started", "denoise", "decode", "succeeded"])
def test_row_27_cancel_races_with_completion(running: Running, moment: str) -> None:
    """Whenever a cancel comes, the job has exactly one terminal event, and a manifest only if it succeeded; one that
    comes after the end is answered with it, and a copy of the job then repeats the result."""
    message = job(parameters={"seed": 1, "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2})
    publish(running.url, message)
    running.ear.wait(
        lambda seen: (
            seen.routing_key.startswith(f"job.{message['job_id']}.")
            and (seen.name == moment or seen.data.get("phase") == moment)
        ),
        worker=running.worker,
    )
    count = running.ear.count
    _cancel(running, message)
    state = _answer(running, message, count)["state"]
    end = running.ear.terminal(message["job_id"], worker=running.worker)
    assert running.do(job())["type"] == "reeld.job.succeeded"
    ends = [seen.name for seen in running.ear.all(job_id=message["job_id"]) if seen.name in ("succeeded", "cancelled")]
    assert ends == [end.name]
    manifest = running.folder / "output" / message["job_id"] / "manifest.json"
    assert manifest.exists() == (end.name == "succeeded")
    if moment == "succeeded":
        assert (state, end.name) == ("succeeded", "succeeded")
        count = running.ear.count
        publish(running.url, message)
        key = f"job.{message['job_id']}."
        again = running.ear.wait(lambda seen: seen.routing_key.startswith(key), after=count, worker=running.worker)
        assert (again.name, again.event["id"]) == ("succeeded", end.event["id"])


def test_reply_to_gets_the_terminal_event(running: Running) -> None:
    """The terminal event also goes to the queue named by reply_to, with the correlation_id."""
    connection = pika.BlockingConnection(pika.URLParameters(running.url))
    channel = connection.channel()
    reply = channel.queue_declare("", exclusive=True).method.queue
    message = job()
    publish(running.url, message, reply_to=reply, correlation_id="mine")
    for _method, properties, body in channel.consume(reply, auto_ack=True, inactivity_timeout=60):
        assert properties is not None, "no reply in 60 s"
        assert properties.correlation_id == "mine"
        assert json.loads(body)["type"] == "reeld.job.succeeded"
        break
    channel.cancel()
    connection.close()


def test_ten_jobs_in_a_row_keep_processes_and_memory(running: Running) -> None:
    """Ten jobs later the processes are the same, and no rank's memory has gone past what ten jobs before took.

    The allocator keeps a job's tensors or gives them back, up to 4 % to and fro, so the least afterwards is compared
    with the most before: what leaks raises both. The soak holds the memory of thousands of jobs to 2 %.
    """
    pids = running.pids()

    def ten_jobs() -> dict[int, list[int]]:
        taken: dict[int, list[int]] = {rank: [] for rank in pids}
        for _ in range(10):
            assert running.do(job())["type"] == "reeld.job.succeeded"
            for rank, pid in pids.items():
                taken[rank].append(psutil.Process(pid).memory_info().rss)
        return taken

    before, after = ten_jobs(), ten_jobs()
    assert running.pids() == pids
    for rank in pids:
        growth = min(after[rank]) - max(before[rank])
        assert growth < 0.02 * max(before[rank]), f"rank {rank} grew by {growth / 1e6:.1f} MB"


def test_heartbeats_name_every_rank_at_work_and_at_rest(running: Running) -> None:
    """Heartbeats keep coming, with every rank in each, during a job and between jobs."""
    message = job(parameters={"seed": 1, "num_frames": 17, "num_inference_steps": 60})
    start = running.ear.count
    running.do(message)
    end = running.ear.count
    running.ear.wait(idle, after=end, worker=running.worker)
    beats = running.ear.all(name="heartbeat")
    assert all([rank["rank"] for rank in beat.data["ranks"]] == [0, 1] for beat in beats)
    during = [
        each
        for each in running.ear.all()[start:end]
        if each.name == "heartbeat" and all(rank["state"] == "generating" for rank in each.data["ranks"])
    ]
    assert during, "no heartbeat with both ranks at work while the job ran"
    for rank in during[-1].data["ranks"]:
        assert rank["job_id"] == message["job_id"]
        assert rank["memory_peak_bytes"] >= rank["memory_used_bytes"] > 0
        assert rank["last_progress_age_seconds"] < 30


def test_row_25_sigterm_in_mid_job(running: Running) -> None:
    """SIGTERM in mid-job finishes and acks it and exits 0; every line that any process wrote from the start on is JSON
    with the fields of the design."""
    message = job(parameters={"seed": 1, "num_frames": 9, "num_inference_steps": 30})
    publish(running.url, message)
    running.ear.wait(
        lambda seen: seen.routing_key == f"job.{message['job_id']}.started", worker=running.worker, timeout=60
    )
    begun = time.monotonic()
    assert running.worker.drain() == 0, running.worker.tail()
    assert running.ear.terminal(message["job_id"], timeout=5).name == "succeeded"
    logs = running.worker.logs()
    assert {line["rank"] for line in logs} == {None, 0, 1}
    files = {path.name: path for path in (running.folder / "logs").iterdir()}
    assert set(files) == {"launcher.jsonl", "rank-0.jsonl", "rank-1.jsonl"}
    of_rank_1 = [json.loads(line) for line in files["rank-1.jsonl"].read_text().splitlines()]
    assert {line["rank"] for line in of_rank_1} == {1}
    assert of_rank_1[-1]["event"] == "left"
    captured = " ".join(line.get("text", "") for line in logs if line["event"] == "captured_output")
    assert "parallel_state" in captured, "what xfuser prints is in log lines"
    assert time.monotonic() - begun < 60
