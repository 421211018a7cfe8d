"""The `reeld` command without a broker: its words, its exit statuses, and what it says of mistakes."""

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from daemon.client import parse_event
from daemon.errors import (
    BrokerUnavailableError,
    ConfigError,
    CredentialsError,
    PublishError,
    UnroutablePublishError,
)
from daemon.events import job_event, worker_event
from daemon.job import is_job_id, parse_job_message
from ops.asyncapi import asyncapi_document
from ops.failure import JobFailedError, UsageError, report
from ops.progress import describe, result_lines
from ops.submission import build_document, image_uri, new_job_id
from ops.watch import line, routing_keys
from parallel.tasks import TASKS

DEAD_BROKER = "amqp://user:secret@127.0.0.1:1/%2F"
CUT_URL = "amqp://u:S3cretPart/w@host:5672/"


def reeld(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the real command in a process of its own, with no REELD_ variable but the given ones."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REELD_")}
    return subprocess.run(
        [sys.executable, "-m", "ops.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**clean, "COLUMNS": "120", "NO_COLOR": "1", **environment},
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line on standard error; fails when there is more, such as a traceback."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("reeld: ")
    return lines[0]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "reeld.toml"
    path.write_text(f'[broker]\nurl = "{DEAD_BROKER}"\n[[models]]\nprofile = "tiny-t2v"\npath = "{tmp_path}/model"\n')
    return path


def test_help_names_every_command_and_exit_status() -> None:
    done = reeld("--help")
    assert done.returncode == 0
    for word in (
        "run",
        "submit",
        "watch",
        "topology",
        "doctor",
        "schema",
        "tiny-model",
        "demo",
        "top",
        "drain",
        "cancel",
        "dlq",
    ):
        assert f" {word} " in done.stdout
    for status in ("0 all went well", "3 the job failed", "75 the broker", "77 the broker", "78 the config"):
        assert status in " ".join(done.stdout.split())


def test_the_command_line_imports_nothing_heavy() -> None:
    """Importing the command imports neither torch nor pika nor numpy nor pydantic."""
    code = "import sys, ops.cli; print([m for m in ('torch', 'pika', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "submit",
        "watch",
        "doctor",
        "schema",
        "tiny-model",
        "demo",
        "topology plan",
        "topology apply",
        "topology check",
        "top",
        "drain",
        "cancel",
        "stacks",
        "support-bundle",
        "dlq list",
        "dlq show",
        "dlq requeue",
        "dlq drop",
    ],
)
def test_every_command_has_examples(command: str) -> None:
    """The help of each command shows how it is called."""
    done = reeld(*command.split(), "--help")
    assert done.returncode == 0
    assert f"reeld {command}" in done.stdout.split("Example", 1)[1]


def test_run_lists_every_fault_of_the_configuration(tmp_path: Path) -> None:
    """All faults at once, each with its field, behind `reeld: `, status 78."""
    path = tmp_path / "reeld.toml"
    path.write_text('dtype = "float8"\nbogus = 1\n[limits]\nmax_num_frames = 0\n')
    done = reeld("run", "--check", "--config", str(path))
    assert done.returncode == 78
    lines = done.stderr.splitlines()
    assert all(text.startswith(f"reeld: {path}: ") for text in lines)
    for field in ("dtype", "bogus", "limits.max_num_frames", "models"):
        assert any(f": {field}: " in text for text in lines)


def test_run_check_names_the_missing_model_file(config_file: Path) -> None:
    """A model folder that is not there is one line and status 78."""
    done = reeld("run", "--check", "--config", str(config_file))
    assert done.returncode == 78
    assert "model" in one_line(done)


def test_a_missing_configuration_file_is_one_line() -> None:
    done = reeld("topology", "plan", "--config", "/nowhere/reeld.toml")
    assert done.returncode == 78
    assert "/nowhere/reeld.toml" in one_line(done)


def test_a_configuration_file_that_cannot_be_read_is_78(config_file: Path) -> None:
    """The unit does not start again what ends with 78; 2, wrong usage, it would."""
    config_file.chmod(0)
    command = [sys.executable, "-m", "ops.cli", "run", "--config", str(config_file)]
    if os.geteuid() == 0:  # who reads every file unless these are taken
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78, done.stderr
    assert f"{config_file}: Permission denied" in one_line(done)


def test_topology_plan_needs_no_broker(config_file: Path) -> None:
    done = reeld("topology", "plan", "--config", str(config_file))
    assert done.returncode == 0
    assert "queue    reeld.jobs.tiny-t2v  x-queue-type=quorum" in done.stdout
    assert "binding  reeld.dead -> reeld.jobs.tiny-t2v.dead  key 'tiny-t2v'" in done.stdout


@pytest.mark.parametrize("command", ["topology check", "topology apply"])
def test_an_unreachable_broker_is_one_line_without_the_password(command: str, config_file: Path) -> None:
    done = reeld(*command.split(), "--config", str(config_file))
    assert done.returncode == 75
    assert "secret" not in one_line(done)
    assert "127.0.0.1:1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "x"], "--pool"),
        (["--pool", "p"], "--prompt"),
        (["--pool", "p", "--prompt", "x", "--height", "3"], "parameters.height"),
        (["--pool", "p", "--prompt", "x", "--image", "/nowhere.png"], "/nowhere.png"),
        (["--pool", "p", "--file", "/nowhere.json"], "/nowhere.json"),
        (["--pool", "p", "--file", "-"], "not JSON"),
        (["--pool", "p", "--prompt", "x", "--url", "http://broker"], "--url"),
        (["--pool", "p", "--prompt", "x", "--url", "amqp://broker:many"], "--url"),
        (["--pool", "p", "--prompt", "x", "--url", CUT_URL], "--url: Value error, "),
        (["--pool", "p", "--prompt", "x", "--job-id", "a/b"], "job_id"),
    ],
)
def test_wrong_usage_of_submit_is_one_line_and_status_2(arguments: list[str], said: str) -> None:
    """What can be known to be wrong is said before anything is published."""
    done = reeld("submit", *arguments, stdin="{not json")
    assert done.returncode == 2
    assert said in one_line(done)
    assert "S3cretPart" not in done.stderr


@pytest.mark.parametrize("command", ["run", "run --check", "topology check", "doctor", "watch --url-file"])
def test_a_url_file_that_is_cut_wrongly_never_shows_its_password(command: str, config_file: Path) -> None:
    """A password with an unescaped / is a fault of the configuration that names the file, and shows none of it."""
    secret = config_file.with_name("url")
    secret.write_text(CUT_URL)
    config_file.write_text(config_file.read_text().replace(f'url = "{DEAD_BROKER}"', f'url_file = "{secret}"'))
    option = [str(secret)] if command.startswith("watch") else ["--config", str(config_file)]
    done = reeld(*command.split(), *option, COLUMNS="500")
    assert done.returncode == (1 if command == "doctor" else 78), done.stderr
    said = done.stdout + done.stderr
    assert f"broker.url_file: {secret}" in said
    assert "percent-encode" in said
    assert "S3cretPart" not in said


def test_schema_job_is_the_schema_the_daemon_validates_with() -> None:
    schema = json.loads(reeld("schema", "job").stdout)
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["properties"]["task"]["enum"] == list(TASKS)


def test_schema_config_is_the_schema_of_the_configuration() -> None:
    schema = json.loads(reeld("schema", "config").stdout)
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["required"] == ["models"]
    assert schema["$defs"]["OutputConfig"]["properties"]["crf"]["maximum"] == 51


def test_markdown_is_of_the_configuration_alone() -> None:
    done = reeld("schema", "job", "--markdown")
    assert done.returncode == 2
    assert "config" in one_line(done)


def test_asyncapi_has_no_dangling_reference() -> None:
    """Every channel, operation and message reference of the document leads somewhere."""
    document = asyncapi_document(prefix="studio")
    assert document["asyncapi"] == "3.0.0"
    assert document["channels"]["job_progress"]["address"] == "job.{job_id}.progress"
    assert document["channels"]["jobs"]["bindings"]["amqp"]["exchange"]["name"] == "studio.jobs"
    for channel in document["channels"].values():
        for message in channel["messages"].values():
            assert message["$ref"].removeprefix("#/components/messages/") in document["components"]["messages"]
    for operation in document["operations"].values():
        assert operation["channel"]["$ref"].removeprefix("#/channels/") in document["channels"]


def test_doctor_reports_each_fault_with_a_fix(config_file: Path) -> None:
    """A missing model and a dead broker are two failed checks with advice; status 1, no traceback."""
    done = reeld("doctor", "--config", str(config_file))
    assert done.returncode == 1
    assert done.stderr == ""
    assert "start the broker" in done.stdout
    assert "put the file there" in done.stdout
    assert "ffmpeg version" in done.stdout


def test_job_ids_are_valid_version_7_uuids_that_sort_by_time() -> None:
    ids = []
    for _ in range(5):
        ids.append(new_job_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert all(is_job_id(job_id) and uuid.UUID(job_id).version == 7 for job_id in ids)
    assert all(uuid.UUID(job_id).variant == uuid.RFC_4122 for job_id in ids)


def test_options_win_over_the_file_and_the_result_is_a_valid_job() -> None:
    base = {"task": "text_to_video", "prompt": "a fox", "parameters": {"seed": 1, "width": 64}}
    document = build_document(base, {"parameters.seed": 2, "output.fps": 8, "job_id": "a", "prompt": None})
    job = parse_job_message(json.dumps(document).encode(), max_body_bytes=10_000)
    assert (job.parameters.seed, job.parameters.width, job.output.fps, job.prompt) == (2, 64, 8, "a fox")
    assert base["parameters"] == {"seed": 1, "width": 64}


def test_a_local_image_becomes_a_file_uri(tmp_path: Path) -> None:
    path = tmp_path / "first frame.png"
    path.write_bytes(b"")
    assert image_uri(str(path)) == path.as_uri()
    assert image_uri("https://example.org/a.png") == "https://example.org/a.png"
    with pytest.raises(UsageError, match="no such file"):
        image_uri(str(tmp_path / "absent.png"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("x"), 2),
        (JobFailedError("x"), 3),
        (BrokerUnavailableError("x"), 75),
        (PublishError("x"), 75),
        (CredentialsError("x"), 77),
        (ConfigError("x"), 78),
        (UnroutablePublishError("x"), 78),
    ],
)
def test_each_expected_error_has_its_status(error: Exception, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error) == status
    assert capsys.readouterr().err == "reeld: x\n"


def test_an_unexpected_error_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        report(KeyError("a bug"))


def test_watch_binds_what_was_asked_for() -> None:
    assert routing_keys(None, worker=False) == ["#"]
    assert routing_keys("a", worker=False) == ["job.a.*"]
    assert routing_keys("a", worker=True) == ["job.a.*", "worker.#"]


def test_events_are_described_in_one_line_each() -> None:
    """Every kind of event has words; what a newer worker adds or leaves out does no harm."""
    progress = {"phase": "denoise", "step": 3, "steps": 8, "seconds_per_step": 0.41, "eta_seconds": 2.05}
    failure = {"code": "malformed_job", "path": "parameters.height", "message": "too\nsmall"}
    ranks = [{"rank": 0, "state": "idle"}, {"rank": 1, "state": "busy", "step": 1, "steps": 4}]
    described = {
        name: describe(parse_event(event.routing_key, event.body))
        for name, event in {
            "progress": job_event("progress", job_id="a", worker_id="w", data=progress),
            "failed": job_event("failed", job_id="a", worker_id="w", data=failure),
            "heartbeat": worker_event("heartbeat", worker_id="w", data={"state": "busy", "ranks": ranks}),
            "accepted": job_event("accepted", job_id="a", worker_id="w", data={"attempt": 1}),
            "empty": job_event("succeeded", job_id="a", worker_id="w", data={}),
        }.items()
    }
    assert described["progress"] == "denoise 3/8, 0.41 s/step, 2.05 s left"
    assert described["failed"] == "failed: malformed_job (parameters.height): too small"
    assert described["heartbeat"] == "busy; ranks: 0 idle, 1 busy 1/4"
    assert described["accepted"] == "accepted attempt=1"
    assert "\n" not in described["empty"]


def test_a_foreign_message_on_the_exchange_is_shown_too() -> None:
    event = parse_event("job.a.b.strange", b"\xff not json")
    assert event.data == {}
    assert line(event) == "--:--:-- job a.b strange"


def test_the_result_names_file_seed_and_seconds() -> None:
    video = {"uri": "file:///o/v.mp4", "path": "/o/v.mp4", "sha256": "ab", "bytes": 9, "codec": "h264"}
    size = {"width": 96, "height": 64, "num_frames": 17, "fps": 8}
    result = {"video": {**video, **size}, "plan": {"seed": 7}, "timings": {"generate_seconds": 1.2345}}
    text = "\n".join(result_lines({"result": result}))
    assert "file:///o/v.mp4" in text
    assert "17 at 8 a second" in text
    assert "96x64" in text
    assert "generate 1.23 s" in text
    assert "seed      7" in text
