"""The demo's jobs: what is asked for, and whether the files and the queue show that it came to be.

Owns the two good jobs, the malformed one, and the checks of their ends. Leaves out running them (`ops.demo`).
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console

from daemon.client import ReceivedEvent
from daemon.dead_letters import DeadLetter, take_dead_letter
from daemon.errors import ErrorCode
from daemon.job import SCHEMA
from daemon.sections import BrokerConfig
from daemon.topology import Topology
from ops.contact_sheet import decode, write_contact_sheet
from ops.failure import CommandFailedError
from ops.progress import failure_text
from ops.submission import new_job_id

WIDTH, HEIGHT, NUM_FRAMES, STEPS, FPS = 144, 96, 17, 8, 8
_DEAD_LETTER_SECONDS = 10


@dataclass(frozen=True, slots=True)
class DemoJob:
    """One of the demo's jobs. `fault` is the path of the field that is wrong on purpose."""

    label: str
    job_id: str
    body: bytes
    fault: str | None = None


def demo_jobs(directory: Path) -> list[DemoJob]:
    """The jobs, with the first frame of one of them drawn under `directory`."""
    image = _draw_first_frame(directory / "inputs" / "first-frame.png")
    parameters = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": NUM_FRAMES,
        "num_inference_steps": STEPS,
        "cfg_scale": 5.0,
    }
    base = {"schema": SCHEMA, "prompt": "a red fox runs through snow", "output": {"fps": FPS}}
    documents = [
        ("text to video", {"task": "text_to_video", "parameters": {**parameters, "seed": 7}}, None),
        (
            "image to video",
            {
                "task": "image_to_video",
                "parameters": {**parameters, "seed": 8},
                "inputs": {"input_image": image.as_uri()},
            },
            None,
        ),
        (
            "malformed",
            {"task": "text_to_video", "parameters": {**parameters, "num_frames": "many"}},
            "parameters.num_frames",
        ),
    ]
    jobs = []
    for label, document, fault in documents:
        job_id = new_job_id()
        body = json.dumps({**base, **document, "job_id": job_id}).encode()
        jobs.append(DemoJob(label, job_id, body, fault))
    return jobs


def show_video(job: DemoJob, end: ReceivedEvent, directory: Path, console: Console) -> None:
    """Decodes the file back, checks it, and prints where it and its contact sheet are."""
    if end.name != "succeeded":
        raise CommandFailedError(f"{job.label}: {end.name}: {failure_text(end.data)}")
    said = end.data["result"]["video"]
    path = Path(said["path"])
    video = decode(path)
    found = (len(video.frames), video.width, video.height, video.fps)
    if found != (NUM_FRAMES, WIDTH, HEIGHT, FPS):
        raise CommandFailedError(f"{path}: (frames, width, height, fps) is {found}, not what was asked for")
    if hashlib.sha256(path.read_bytes()).hexdigest() != said["sha256"]:
        raise CommandFailedError(f"{path}: its SHA-256 is not the event's")
    sheet = directory / f"{job.label.replace(' ', '-')}.png"
    write_contact_sheet(video, sheet)
    console.print(f"[bold]{job.label}[/]")
    console.print(f"  video   {path}", soft_wrap=True)
    size = f"{video.width}x{video.height}"
    console.print(f"          {len(video.frames)} frames, {size}, {video.fps:g} a second, {video.codec}")
    console.print(f"  sheet   {sheet}", soft_wrap=True)


def show_dead_letter(
    job: DemoJob, end: ReceivedEvent, broker: BrokerConfig, topology: Topology, console: Console
) -> None:
    """Takes the job out of the dead-letter queue, checks its reason, and prints it."""
    if end.name != "failed" or end.data.get("code") != ErrorCode.MALFORMED_JOB:
        raise CommandFailedError(f"{job.label}: {end.name} instead of failed with {ErrorCode.MALFORMED_JOB}")
    letter = _await_dead_letter(broker, topology)
    reason = {name: str(letter.headers.get(f"x-reeld-{name}")) for name in ("code", "path", "message")}
    if letter.body != job.body or letter.message_id != job.job_id:
        raise CommandFailedError(f"{topology.dead_queue}: holds another message than the job that was published")
    if (reason["code"], reason["path"]) != (ErrorCode.MALFORMED_JOB.value, job.fault):
        raise CommandFailedError(f"{topology.dead_queue}: the letter's reason is {reason}, the fault is {job.fault}")
    console.print(f"[bold]{job.label}[/]")
    console.print(f"  queue   {topology.dead_queue}", soft_wrap=True)
    for name, value in reason.items():
        console.print(f"  {name:<7} {value}", markup=False, soft_wrap=True)


def _draw_first_frame(path: Path) -> Path:
    """A sun over hills, drawn at four times the size for smooth edges."""
    scale = 4
    width, height = WIDTH * scale, HEIGHT * scale
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for y in range(height):
        share = y / height
        draw.line([(0, y), (width, y)], fill=(int(60 + 180 * share), int(110 + 60 * share), int(220 - 120 * share)))
    draw.ellipse([width * 0.6, height * 0.15, width * 0.6 + height * 0.3, height * 0.45], fill=(255, 236, 150))
    draw.ellipse([-width * 0.2, height * 0.6, width * 0.7, height * 1.6], fill=(40, 90, 60))
    draw.ellipse([width * 0.3, height * 0.7, width * 1.3, height * 1.7], fill=(30, 70, 50))
    image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(path)
    return path


def _await_dead_letter(broker: BrokerConfig, topology: Topology) -> DeadLetter:
    deadline = time.monotonic() + _DEAD_LETTER_SECONDS
    while time.monotonic() < deadline:
        letter = take_dead_letter(broker, topology.pool)
        if letter is not None:
            return letter
        time.sleep(0.1)  # a quorum queue shows a message a moment after it was confirmed
    raise CommandFailedError(f"{topology.dead_queue}: no dead letter came in {_DEAD_LETTER_SECONDS} s")
