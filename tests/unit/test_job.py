"""What counts as a job: strict, named by path, and never an exception that nobody expects."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon.errors import ErrorCode, PermanentJobError
from daemon.job import (
    JobMessage,
    job_json_schema,
    make_job,
    parse_job_message,
    request_digest,
    salvage_job_id,
)
from tests.unit.job_bodies import FULL, JSON_VALUES, LEAST, mutated_bodies

LIMIT = 1 << 20


def body(**changes: Any) -> bytes:
    return json.dumps(LEAST | changes).encode()


def parse(raw: bytes) -> JobMessage:
    return parse_job_message(raw, max_body_bytes=LIMIT)


def refusal(raw: bytes, limit: int = LIMIT) -> PermanentJobError:
    with pytest.raises(PermanentJobError) as caught:
        parse_job_message(raw, max_body_bytes=limit)
    assert caught.value.code is ErrorCode.MALFORMED_JOB
    assert not caught.value.retryable
    return caught.value


def test_a_full_job_is_read_as_it_was_written() -> None:
    """Every field of the schema arrives in the model, integers for floats included."""
    message = parse(json.dumps(FULL).encode())
    assert message.model_dump(mode="json", by_alias=True, exclude_none=True) == FULL
    assert isinstance(message.parameters.cfg_scale, float)


def test_a_job_needs_only_schema_task_and_prompt() -> None:
    """Everything else may be left out, and stays unset for the model's defaults."""
    message = parse(body())
    assert message.job_id is None
    assert set(message.parameters.model_dump().values()) == {None}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"schema": "reeld.job/2"}, "schema"),
        ({"schema": None}, "schema"),
        ({"task": "audio_to_video"}, "task"),
        ({"surprise": 1}, "surprise"),
        ({"job_id": "../etc"}, "job_id"),
        ({"job_id": "with\nnewline"}, "job_id"),
        ({"job_id": "a" * 129}, "job_id"),
        ({"parameters": {"height": "480"}}, "parameters.height"),
        ({"parameters": {"height": True}}, "parameters.height"),
        ({"parameters": {"height": 480.0}}, "parameters.height"),
        ({"parameters": {"height": 15}}, "parameters.height"),
        ({"parameters": {"width": 4097}}, "parameters.width"),
        ({"parameters": {"num_frames": 0}}, "parameters.num_frames"),
        ({"parameters": {"seed": -1}}, "parameters.seed"),
        ({"parameters": {"seed": 2**63}}, "parameters.seed"),
        ({"parameters": {"steps": 4}}, "parameters.steps"),
        ({"parameters": {"sigma_shift": 0}}, "parameters.sigma_shift"),
        ({"parameters": []}, "parameters"),
        ({"inputs": {"input_image": ""}}, "inputs.input_image"),
        ({"inputs": {"input_sound": "x"}}, "inputs.input_sound"),
        ({"parameters": {"denoising_strength": 1.5}}, "parameters.denoising_strength"),
        ({"parameters": {"switch_DiT_boundary": 1}}, "parameters.switch_DiT_boundary"),
        ({"parameters": {"camera_control_direction": "Sideways"}}, "parameters.camera_control_direction"),
        ({"output": {"fps": 0}}, "output.fps"),
        ({"time_limit_seconds": 0}, "time_limit_seconds"),
        ({"loras": [{"path": "x"}]}, "loras.0.name"),
        ({"loras": [{"name": "../x"}]}, "loras.0.name"),
        ({"loras": [{"name": "a"}, {"name": "a", "strength": 99}]}, "loras.1.strength"),
        ({"loras": [{"name": "a", "target": "dit2"}]}, "loras.0.target"),
        ({"metadata": []}, "metadata"),
    ],
)
def test_row_20_a_wrong_field_is_named_by_its_path(changes: dict[str, Any], path: str) -> None:
    """A wrong type, value or name is malformed_job with the field's path, and nothing is coerced."""
    error = refusal(body(**changes))
    assert error.path == path
    assert path in error.message


@pytest.mark.parametrize("field", ["schema", "task", "prompt"])
def test_a_missing_field_is_named(field: str) -> None:
    """What must be there and is not is named."""
    assert refusal(json.dumps({k: v for k, v in LEAST.items() if k != field}).encode()).path == field


def test_all_faults_are_in_the_message_and_the_first_is_the_path() -> None:
    """A publisher who made three mistakes hears of all three at once."""
    error = refusal(body(prompt=1, parameters={"height": 1, "seed": "x"}))
    assert error.path == "prompt"
    assert all(path in error.message for path in ("prompt", "parameters.height", "parameters.seed"))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (body() + b"x", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (json.dumps(LEAST).encode("utf-16"), "not UTF-8"),
        (b"[]", "one JSON object"),
        (b'"text"', "one JSON object"),
        (b"null", "one JSON object"),
        (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"seed":' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"metadata": NaN}', "NaN"),
        (b'{"metadata": -Infinity}', "-Infinity"),
    ],
)
def test_row_20_what_is_no_json_object_is_malformed(raw: bytes, says: str) -> None:
    """Bad JSON, bad UTF-8, NaN and bottomless nesting blame the body as a whole."""
    error = refusal(raw)
    assert error.path == "(body)"
    assert says in error.message


def test_row_21_an_oversized_body_is_not_even_parsed() -> None:
    """The limit of the body's size comes first and is named, to the byte."""
    raw = body()
    assert parse_job_message(raw, max_body_bytes=len(raw)).prompt == "a fox"
    assert str(len(raw)) in refusal(raw, limit=len(raw) - 1).message


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"prompt": "\ud800"}, "prompt"),
        ({"task": "\udfff"}, "task"),
        ({"job_id": "\ud800"}, "job_id"),
        ({"metadata": {"a": [0, "x\ud800"]}}, "metadata.a.1"),
        ({"metadata": {"\ud800": 1}}, "metadata"),
        ({"\ud800": 1}, "(body)"),
    ],
)
def test_half_a_surrogate_pair_is_refused_where_it_stands(changes: dict[str, Any], path: str) -> None:
    """Python's JSON reads a lone surrogate, but neither an event nor the tokenizer could take it."""
    error = refusal(body(**changes))
    assert error.path == path
    error.message.encode()


def test_a_number_that_overflows_is_refused_in_metadata_too() -> None:
    """1e999 would come back in events as Infinity, which is not JSON."""
    assert refusal(body().replace(b'"a fox"', b'"a", "metadata": {"x": 1e999}')).path == "metadata.x"


@pytest.mark.parametrize("depth", [70, 250])
def test_deep_metadata_is_refused(depth: int) -> None:
    """Nesting that a consumer of the echo could not read is malformed, long before Python itself gives up."""
    nested = b"[" * depth + b"]" * depth
    assert refusal(body().replace(b'"a fox"', b'"a", "metadata": {"x": ' + nested + b"}")).path == "metadata"


def test_a_path_fits_into_a_header() -> None:
    """A field name of a megabyte must not make a dead letter that no AMQP frame can hold."""
    error = refusal(body(**{"x" * 900_000: 1}))
    assert error.path == "x" * 200
    assert len(error.message) <= 2000


def test_message_id_is_the_job_id_when_the_body_has_none() -> None:
    """The AMQP message_id stands in for job_id; the body's own wins."""
    assert make_job(parse(body()), message_id="from-amqp").job_id == "from-amqp"
    assert make_job(parse(body(job_id="own")), message_id="from-amqp").job_id == "own"


@pytest.mark.parametrize(
    ("message_id", "path"),
    [
        (None, "job_id"),
        ("", "message_id"),
        ("a b", "message_id"),
        ("../x", "message_id"),
        ("\ud800", "message_id"),
    ],
)
def test_a_job_without_a_usable_id_is_malformed(message_id: str | None, path: str) -> None:
    """Without an id a redelivery could not be recognised, and an odd one could leave the output folder."""
    with pytest.raises(PermanentJobError) as caught:
        make_job(parse(body()), message_id=message_id)
    assert caught.value.code is ErrorCode.MALFORMED_JOB
    assert caught.value.path == path


def test_the_digest_is_of_what_was_asked_for() -> None:
    """job_id, metadata, order and spelling do not change the digest; the request itself does."""
    digest = request_digest(parse(body()))
    same = [
        body(job_id="x", metadata={"a": 1}),
        body(parameters={}, loras=[], negative_prompt=None),
        json.dumps(dict(reversed(LEAST.items())), indent=2).encode(),
    ]
    assert {request_digest(parse(raw)) for raw in same} == {digest}
    others = [
        body(prompt="a cat"),
        body(parameters={"seed": 0}),
        body(output={"fps": 8}),
        body(negative_prompt=""),
    ]
    assert len({digest, *(request_digest(parse(raw)) for raw in others)}) == 5
    assert request_digest(parse(body(parameters={"cfg_scale": 5}))) == request_digest(
        parse(body(parameters={"cfg_scale": 5.0}))
    )


@pytest.mark.parametrize(
    ("raw", "message_id", "job_id"),
    [
        (b'{"job_id": "meant"}', "other", "meant"),
        (b'{"job_id": "a b"}', "other", "other"),
        (b'{"job_id": "\\ud800"}', None, None),
        (b'{"job_id": 5}', None, None),
        (b"[1]", "other", "other"),
        (b"\xff\xfe\xff", "other", "other"),
        (b"[" * 100_000, "bad id", None),
    ],
)
def test_a_malformed_job_keeps_its_id_where_it_has_one(raw: bytes, message_id: str | None, job_id: str | None) -> None:
    """The publisher of a malformed job hears of it under the id that it meant."""
    assert salvage_job_id(raw, message_id) == job_id


def test_the_json_schema_is_that_of_the_model() -> None:
    """The published schema names its draft and allows no unknown field."""
    schema = job_json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["schema", "task", "prompt"]


@given(st.binary(max_size=300) | mutated_bodies() | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300, deadline=None)
@example(body())
@example(json.dumps(FULL).encode())
def test_every_body_is_a_job_or_a_permanent_error(raw: bytes) -> None:
    """Whatever arrives yields a job whose echo is JSON in UTF-8, or a malformed_job that fits a header."""
    salvage_job_id(raw, None)
    refused = None
    try:
        job = make_job(parse(raw), message_id="fallback")
    except PermanentJobError as error:
        refused = error
    if refused is None:
        json.dumps(job.message.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()
        assert len(job.request_digest) == 64
    else:
        assert refused.code is ErrorCode.MALFORMED_JOB
        assert refused.path
        assert len(refused.path.encode()) <= 800
        assert len(refused.message.encode()) <= 8000
