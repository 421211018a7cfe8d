"""The `data` of every event as models: for the published schema, and for tests to hold real events against.

Owns the shapes that watchers may rely on; a newer worker may add fields. Leaves out the envelope and the
names (`daemon.events`).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from daemon.errors import ErrorCode


class _Data(BaseModel):
    model_config = ConfigDict(extra="allow")


class Accepted(_Data):
    """The job was taken from the queue and is valid."""

    job_id: str
    attempt: int
    worker_id: str


class Started(Accepted):
    """The plan was sent to every rank."""

    cfg_degree: int
    ulysses_degree: int
    ring_degree: int
    world_size: int


class JobProgress(_Data):
    """How far the job is; at most about one a second."""

    job_id: str
    attempt: int
    phase: str
    step: int | None = None
    steps: int | None = None
    seconds_per_step: float | None = None
    eta_seconds: float | None = None


class Retrying(_Data):
    """The job will be tried again after a pause."""

    job_id: str
    attempt: int
    delay_seconds: float
    code: ErrorCode
    message: str


class Video(_Data):
    path: str
    uri: str
    sha256: str
    bytes: int
    width: int
    height: int
    num_frames: int
    fps: int
    codec: str


class Result(_Data):
    video: Video
    plan: dict[str, Any] = Field(description="every parameter as it was used, the seed included")
    timings: dict[str, float] = Field(description="seconds")
    manifest: str | None = Field(None, description="path of the manifest beside the video")


class Succeeded(_Data):
    """The video is on disk. Terminal; a redelivery may repeat it with the same id."""

    job_id: str
    attempt: int
    worker_id: str
    metadata: dict[str, Any]
    result: Result


class Failed(_Data):
    """The job ended without a video. Terminal; its message is in the dead-letter queue."""

    job_id: str
    attempt: int
    worker_id: str
    code: ErrorCode
    message: str
    path: str | None = Field(None, description="the field at fault, like parameters.height")
    retryable: bool
    metadata: dict[str, Any] = Field(default_factory=dict)


class Cancelled(_Data):
    """The job was cancelled on request. Terminal."""

    job_id: str
    attempt: int
    worker_id: str
    metadata: dict[str, Any] = Field(default_factory=dict)


class CancelNoted(_Data):
    """A worker's answer to a cancel; each worker gives one. No end of the job: that is `cancelled`, or another."""

    job_id: str
    worker_id: str
    state: Literal["running", "finishing", "succeeded", "unknown"] = Field(
        description="what this worker knows: it stops at the next step; it is too late, the video is being written; it "
        "was done before; it is not here, and if it comes while the cancel is remembered, it does not start"
    )
    remembered_seconds: float


class RankHealth(_Data):
    rank: int
    state: str
    phase: str | None = None
    job_id: str | None = None
    step: int | None = None
    steps: int | None = None
    last_progress_age_seconds: float | None = None
    memory_used_bytes: int | None = None
    memory_reserved_bytes: int | None = Field(None, description="with what the allocator keeps for later")
    memory_peak_bytes: int | None = Field(None, description="the most used in this job or, between two, in the last")


class Heartbeat(_Data):
    """The worker and each of its ranks, every few seconds."""

    worker_id: str
    pool: str
    state: str
    job_id: str | None = None
    uptime_seconds: float
    versions: dict[str, Any]
    models: list[Any]
    world_size: int
    consumer: str = Field(description="'consuming', or why it does not consume")
    publisher: str = Field(description="'connected', or why nothing can be published")
    draining: str | None = Field(None, description="who asked for the drain: a signal's name, or 'control'")
    instance: str = Field(description="of this process alone, so that two under one worker_id are told apart")
    host: str
    pid: int = Field(description="of rank 0")
    heartbeat_seconds: float = Field(description="how often this event comes; one that stays away for long is silent")
    ranks: list[RankHealth]


class Draining(_Data):
    """The worker was asked to drain: it finishes its job and stops. Also its answer to each drain message."""

    worker_id: str
    reason: str = Field(description="who asked: a signal's name, or 'control'")
    job_id: str | None = Field(None, description="the job it finishes first")


class WorkerLife(_Data):
    """The worker started, or stops."""


JOB_EVENTS: dict[str, type[_Data]] = {
    "accepted": Accepted,
    "started": Started,
    "progress": JobProgress,
    "retrying": Retrying,
    "succeeded": Succeeded,
    "failed": Failed,
    "cancelled": Cancelled,
    "cancel_noted": CancelNoted,
}
WORKER_EVENTS: dict[str, type[_Data]] = {
    "heartbeat": Heartbeat,
    "started": WorkerLife,
    "draining": Draining,
    "stopped": WorkerLife,
}
