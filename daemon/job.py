"""A job: one JSON message, parsed at the edge into a frozen model.

Owns the versioned schema `reeld.job/1` and its strict validation; a wrong field is named by its path. Leaves
out what depends on the daemon's models and limits (`daemon.planning`).
"""

import hashlib
import json
import math
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from daemon.errors import ErrorCode, PermanentJobError

SCHEMA = "reeld.job/1"
JOB_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
# Each part begins with a letter or digit, so no name leads out of its directory.
LORA_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$"
LoraTarget = Literal["both", "high_noise", "low_noise"]
_MAX_DEPTH = 64
_MAX_PATH_CHARACTERS = 200
JobId = Annotated[str, Field(pattern=JOB_ID_PATTERN)]
Uri = Annotated[str, Field(min_length=1)] | None
CameraDirection = Literal["Left", "Right", "Up", "Down", "LeftUp", "LeftDown", "RightUp", "RightDown"]
TaskName = Literal[
    "text_to_video",
    "image_to_video",
    "first_last_frame_to_video",
    "video_to_video",
    "vace",
    "control_to_video",
    "camera_to_video",
    "speech_to_video",
]


class OversizedBodyError(PermanentJobError):
    """Raised when a body is over the limit: nothing of it is parsed, not for the id that it meant either."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Parameters(_Message):
    """Generation parameters in DiffSynth's spellings; what is absent takes the model profile's default."""

    seed: int | None = Field(None, ge=0, lt=2**63)
    height: int | None = Field(None, ge=16, le=4096, description="pixels; rounded up to the model's multiple")
    width: int | None = Field(None, ge=16, le=4096, description="pixels; rounded up to the model's multiple")
    num_frames: int | None = Field(None, ge=1, le=1025, description="frames; rounded up to 4n+1")
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    cfg_scale: float | None = Field(None, ge=0, le=50, allow_inf_nan=False)
    sigma_shift: float | None = Field(None, gt=0, le=50, allow_inf_nan=False)
    switch_DiT_boundary: float | None = Field(  # noqa: N815 - DiffSynth's spelling
        None, gt=0, lt=1, description="fraction of the noise below which the second of two experts takes over"
    )
    denoising_strength: float | None = Field(
        None, gt=0, le=1, description="video_to_video: how much of the input is replaced; 1 is all of it"
    )
    vace_scale: float | None = Field(None, ge=0, le=10, allow_inf_nan=False, description="vace: its weight")
    camera_control_direction: CameraDirection | None = Field(None, description="camera_to_video: where it moves")
    camera_control_speed: float | None = Field(
        None, gt=0, le=1, description="camera_to_video: way of the camera a frame; DiffSynth's default is 1/54"
    )
    motion_bucket_id: int | None = Field(
        None, ge=0, le=100, description="text_to_video with a motion controller: 0 is slow, 100 is fast"
    )
    tea_cache_l1_thresh: float | None = Field(
        None, gt=0, le=10, allow_inf_nan=False, description="TeaCache: leaves steps out; faster, and lossy"
    )


class Inputs(_Message):
    """URIs of what the task needs; a video gives its first num_frames frames, one by one."""

    input_image: Uri = Field(None, description="the first frame; for speech_to_video who speaks")
    end_image: Uri = Field(None, description="the last frame (first_last_frame_to_video)")
    input_video: Uri = Field(None, description="the video to change (video_to_video)")
    control_video: Uri = Field(None, description="poses, depths or edges to follow (control_to_video)")
    reference_image: Uri = Field(None, description="whom or what to show (control_to_video, some models)")
    vace_video: Uri = Field(None, description="the video to follow or to edit (vace)")
    vace_video_mask: Uri = Field(None, description="white is made anew, black is kept (vace)")
    vace_reference_image: Uri = Field(None, description="whom or what to show (vace)")
    input_audio: Uri = Field(None, description="what is said (speech_to_video)")
    s2v_pose_video: Uri = Field(None, description="how the speaker moves (speech_to_video); may be shorter")


class Lora(_Message):
    """A LoRA that the operator has configured; publishers name files, they never choose paths."""

    name: str = Field(
        pattern=LORA_NAME_PATTERN, max_length=200, description="as configured: `name`, or `name/file` in a directory"
    )
    strength: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False)
    target: LoraTarget | None = Field(
        None, description="the expert it is for; by default as configured, else both (a model with one DiT: both)"
    )


class Output(_Message):
    fps: int | None = Field(None, ge=1, le=120, description="frames per second of the video file")


class JobMessage(_Message):
    """The body of a job message."""

    schema_: Literal["reeld.job/1"] = Field(alias="schema")
    job_id: JobId | None = Field(None, description="may come from the AMQP message_id instead")
    task: TaskName
    prompt: str
    negative_prompt: str | None = None
    parameters: Parameters = Parameters()
    inputs: Inputs = Inputs()
    loras: tuple[Lora, ...] = Field((), max_length=8, description="added in this order")
    output: Output = Output()
    time_limit_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="the publisher's own; echoed back in the last event"
    )


class Job(BaseModel):
    """A valid job, together with what AMQP said about it."""

    model_config = ConfigDict(frozen=True)

    job_id: str
    message: JobMessage
    request_digest: str
    attempt: int
    reply_to: str | None = None
    correlation_id: str | None = None
    traceparent: str | None = None


def job_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a job message, from the model the daemon validates with."""
    schema = JobMessage.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}


def parse_job_message(body: bytes, *, max_body_bytes: int) -> JobMessage:
    """Parses and validates a message body.

    Raises PermanentJobError(malformed_job), whose `path` is the first wrong field and whose message lists
    all; OversizedBodyError before anything is parsed.
    """
    if len(body) > max_body_bytes:
        text = f"the body has {len(body)} bytes; at most {max_body_bytes} are read"
        raise OversizedBodyError(ErrorCode.MALFORMED_JOB, text, path="(body)")
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _malformed(f"the body is not UTF-8: byte {error.start}", path="") from error
    except (ValueError, RecursionError) as error:
        raise _malformed(f"the body is not JSON: {error}", path="") from error
    if not isinstance(document, dict):
        raise _malformed("the body must be one JSON object", path="")
    _check_sendable(document, ())
    try:
        # Strict Python-mode validation would refuse JSON arrays for tuples, so validate as JSON.
        return JobMessage.model_validate_json(json.dumps(document), by_alias=True)
    except pydantic.ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        paths = [_dotted(fault["loc"]) for fault in faults]
        text = "; ".join(f"{path}: {fault['msg']}" for path, fault in zip(paths, faults, strict=True))
        raise _malformed(text[:2000], path=paths[0]) from error


def request_digest(message: JobMessage) -> str:
    """SHA-256 of what was asked for: two messages with one digest ask for the same video."""
    # Without what is absent: a field that a later version adds must not change what an old message asked for.
    asked = message.model_dump(mode="json", by_alias=True, exclude={"job_id", "metadata"}, exclude_none=True)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def make_job(
    message: JobMessage,
    *,
    message_id: str | None,
    attempt: int = 1,
    reply_to: str | None = None,
    correlation_id: str | None = None,
    traceparent: str | None = None,
) -> Job:
    """Joins body and AMQP properties. Raises PermanentJobError(malformed_job) without a usable job_id."""
    job_id = message.job_id or message_id
    if job_id is None:
        raise _malformed(
            "neither job_id nor the AMQP message_id is set; without one a redelivery cannot be recognised",
            path="job_id",
        )
    if not is_job_id(job_id):
        raise _malformed(f"message_id must match {JOB_ID_PATTERN}", path="message_id")
    return Job(
        job_id=job_id,
        message=message,
        request_digest=request_digest(message),
        attempt=attempt,
        reply_to=reply_to,
        correlation_id=correlation_id,
        traceparent=traceparent,
    )


def salvage_job_id(body: bytes, message_id: str | None) -> str | None:
    """The id a malformed job meant, so that its publisher hears of the failure; None when there is none.

    Parses all of `body`: its size is the caller's to check.
    """
    try:
        document = json.loads(body)
        job_id = document.get("job_id") if isinstance(document, dict) else None
    except (ValueError, RecursionError):
        job_id = None
    for candidate in (job_id, message_id):
        if isinstance(candidate, str) and is_job_id(candidate):
            return candidate
    return None


_ID_ADAPTER: pydantic.TypeAdapter[str] = pydantic.TypeAdapter(JobId)


def is_job_id(text: str) -> bool:
    try:
        _ID_ADAPTER.validate_python(text)
    except pydantic.ValidationError:
        return False
    return True


def _malformed(message: str, *, path: str) -> PermanentJobError:
    # Bounded: the path holds the publisher's own field names, and goes into a header of the dead letter.
    path = path[:_MAX_PATH_CHARACTERS] or "(body)"
    return PermanentJobError(ErrorCode.MALFORMED_JOB, message, path=path)


def _check_sendable(value: object, path: tuple[str | int, ...]) -> None:
    """Refuses what Python's JSON reads but no event could echo: lone surrogates, 1e999, deep nesting."""
    if len(path) > _MAX_DEPTH:
        raise _malformed(f"nested deeper than {_MAX_DEPTH}", path=str(path[0]))
    match value:
        case str() if not _is_unicode(value):
            raise _malformed("holds half of a surrogate pair, which is no character", path=_dotted(path))
        case float() if not math.isfinite(value):
            raise _malformed("the number is too large", path=_dotted(path))
        case list():
            for index, item in enumerate(value):
                _check_sendable(item, (*path, index))
        case dict():
            for key, item in value.items():
                if not _is_unicode(key):
                    raise _malformed("a field's name holds half of a surrogate pair", path=_dotted(path))
                _check_sendable(item, (*path, key))


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in path)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
