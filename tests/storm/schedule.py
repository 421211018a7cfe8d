"""What a storm consists of: jobs and faults, all drawn from one seed.

Owns the kinds, their weights, and drawing them; the same seed and sizes give the same schedule. Which job a fault
meets still depends on the machine's pace: faults come after so many jobs have ended. Leaves out doing any of it.

Weights: most faults cost a few seconds. A lost launcher or fork server costs ten CPU seconds of imports, so one fault
in twenty meets them.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

# Kinds of jobs; what is cancelled is also of a kind of its own.
JOB_KINDS = {
    "plain": 70,
    "without a seed": 3,
    "image": 4,
    "sent twice": 5,
    "sent three times": 2,
    "conflicting": 3,
    "cancelled while queued": 3,
    "cancelled while running": 2,
    "cancelled when done": 1,
    "malformed": 4,
    "not JSON": 1,
    "without an id": 1,
    "odd properties": 1,
}

# Kinds of faults: (weight, least and most seconds that they last).
FAULT_KINDS: dict[str, tuple[int, float, float]] = {
    "reset all connections": (26, 0, 0),
    "reset the consumer": (22, 0, 0),
    "reset the publisher": (18, 0, 0),
    "reset at the ack": (16, 0, 0),
    "reset at a confirm": (16, 0, 0),
    "stall": (18, 0.5, 4),
    "drip": (8, 1, 4),
    "refuse connections": (8, 1, 4),
    "black hole": (5, 8, 14),
    "broker closes all connections": (8, 0, 0),
    "broker paused": (6, 1, 5),
    "memory alarm": (6, 1, 5),
    "broker restarted": (6, 0, 0),
    "broker killed": (5, 0, 0),
    "rank 0 stopped for a while": (5, 1, 8),
    "peer stopped for a while": (4, 1, 8),
    "rank 0 stopped for good": (1, 0, 0),
    "peer stopped for good": (1, 0, 0),
    "rank 0 killed": (14, 0, 0),
    "peer killed": (14, 0, 0),
    "fork server killed": (3, 0, 0),
    "launcher killed": (4, 0, 0),
    "drained": (5, 0, 0),
    "drained twice": (2, 0, 0.5),
    "unknown job cancelled": (3, 0, 0),
}


@dataclass(frozen=True, slots=True)
class StormJob:
    """One job and how it is published. `messages` are (body, message_id), in order; equal ones are copies."""

    kind: str
    job_id: str | None
    messages: tuple[tuple[bytes, str | None], ...]


@dataclass(frozen=True, slots=True)
class StormFault:
    """One fault: after how many jobs, for how long, and which daemon it meets where it meets one."""

    kind: str
    after_jobs: int
    seconds: float
    daemon: int


@dataclass(frozen=True, slots=True)
class Schedule:
    seed: int
    jobs: tuple[StormJob, ...]
    faults: tuple[StormFault, ...]

    def lines(self) -> list[str]:
        """The schedule in short."""
        jobs = Counter(job.kind for job in self.jobs)
        faults = Counter(fault.kind for fault in self.faults)
        return [
            f"seed {self.seed}: {len(self.jobs)} jobs, {len(self.faults)} faults",
            "jobs: " + ", ".join(f"{count} {kind}" for kind, count in jobs.most_common()),
            "faults: " + ", ".join(f"{count} {kind}" for kind, count in faults.most_common()),
        ]


def draw_schedule(seed: int, *, jobs: int, faults: int, daemons: int, image: str) -> Schedule:
    """Draws a schedule. `image` is the URI of a picture that image-to-video jobs may use."""
    dice = random.Random(seed)
    drawn = tuple(
        _job(dice, dice.choices(list(JOB_KINDS), list(JOB_KINDS.values()))[0], f"s{seed}-{number}", image)
        for number in range(jobs)
    )
    weights = [weight for weight, _, _ in FAULT_KINDS.values()]
    # Not in the first and last few: those are for a storm that has begun, and for a queue that is not empty yet.
    after = sorted(dice.randint(2, max(2, int(jobs * 0.95))) for _ in range(faults))
    kinds = dice.choices(list(FAULT_KINDS), weights, k=faults)
    return Schedule(
        seed,
        drawn,
        tuple(
            StormFault(kind, at, round(dice.uniform(*FAULT_KINDS[kind][1:]), 2), dice.randrange(daemons))
            for kind, at in zip(kinds, after, strict=True)
        ),
    )


def _job(dice: random.Random, kind: str, job_id: str, image: str) -> StormJob:
    parameters: dict[str, Any] = {
        "seed": dice.randrange(2**32),
        "height": 32,
        "width": dice.choice((32, 64)),
        "num_frames": dice.choice((5, 9)),
        "num_inference_steps": dice.choice((1, 2, 3)),
    }
    body: dict[str, Any] = {
        "schema": "reeld.job/1",
        "job_id": job_id,
        "task": "text_to_video",
        "prompt": dice.choice(("a red fox runs through snow", "waves at night", "")),
        "parameters": parameters,
        "output": {"fps": 8},
        "metadata": {"number": job_id},
    }
    first = json.dumps(body).encode()
    one = ((first, job_id),)
    match kind:
        case "without a seed":
            del parameters["seed"]
        case "image":
            body |= {"task": "image_to_video", "inputs": {"input_image": image}}
        case "sent twice" | "sent three times":
            return StormJob(kind, job_id, one * (2 if kind == "sent twice" else 3))
        case "conflicting":
            other = json.dumps({**body, "parameters": {**parameters, "seed": parameters["seed"] + 1}}).encode()
            return StormJob(kind, job_id, (*one, (other, job_id)))
        case "cancelled while running":
            parameters["num_inference_steps"] = 120
        case "malformed":
            wrong: dict[str, Any] = dice.choice(
                (
                    {"parameters": {"height": "tall"}},
                    {"schema": "reeld.job/9"},
                    {"surprise": 1},
                    {"prompt": None},
                    {"task": "image_to_video"},
                    {"task": "image_to_video", "inputs": {"input_image": "file:///etc/passwd"}},
                    {"parameters": {**parameters, "num_frames": 1000}},
                )
            )
            return StormJob(kind, job_id, ((json.dumps({**body, **wrong}).encode(), job_id),))
        case "not JSON":
            return StormJob(kind, job_id, ((dice.randbytes(40), job_id),))
        case "without an id":
            return StormJob(kind, None, ((json.dumps({**body, "job_id": None}).encode(), None),))
        case _:
            return StormJob(kind, job_id, one)
    return StormJob(kind, job_id, ((json.dumps(body).encode(), job_id),))
