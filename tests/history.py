"""What a run leaves behind for the checker: a folder with `history.jsonl` and, beside it, `logs/`.

Owns the records, their file format (one JSON object a line, in the order in which things were seen) and recording the
final state of the output directory and of the queues. Everything is seen from outside of the product: what the
publisher sent, what the status exchange said, which frames passed the proxy, what lies on disk and in the queues.
Leaves out what any of it means (`tests.checker`) and reading frames (`tests.wire`).

A message is known by the SHA-256 of its body together with its `message_id`: that is all that publisher, wire and
dead-letter queue have in common, and it needs no understanding of the body.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pika

HISTORY = "history.jsonl"
LOGS = "logs"


class HistoryError(ValueError):
    """Raised when a folder holds no history that could be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The first record: where things go in this run, and which evidence there must be."""

    title: str = ""
    jobs_queue: str = "reeld.jobs.test"
    dead_exchange: str = "reeld.dead"
    status_exchange: str = "reeld.status"
    wire: bool = True  # a proxy saw every frame between daemons and broker
    logs: bool = True  # the daemons' output is in logs/


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One attempt to publish a job. Without a confirm it may have arrived, and was sent again."""

    job_id: str | None  # as the publisher meant it
    body: str  # SHA-256
    message_id: str | None = None
    digest: str | None = None  # of the request, as `daemon.job.request_digest`; None for what is no job
    confirmed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAsked:
    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """One event of a job, as it came over the status exchange (or lay in the queue of the unrouted)."""

    job_id: str
    name: str  # the routing key's last word
    event: dict[str, Any] = field(default_factory=dict)  # the CloudEvent; of progress only what is needed

    @property
    def data(self) -> dict[str, Any]:
        data = self.event.get("data")
        return data if isinstance(data, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """Basic.Deliver, to a daemon."""

    connection: int
    channel: int
    delivery_tag: int
    queue: str
    body: str
    message_id: str | None = None
    redelivered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """The broker's Basic.Ack for a message that a daemon published, unless it was returned as unroutable."""

    exchange: str
    routing_key: str
    body: str
    message_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Acked:
    """A daemon's Basic.Ack. `manifest` is the SHA-256 of the job's manifest at that moment, None without one."""

    connection: int
    channel: int
    delivery_tag: int
    manifest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedBack:
    """A daemon's Basic.Nack or Basic.Reject."""

    connection: int
    channel: int
    delivery_tag: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSeen:
    """What a video file held at some moment. None: it was not there."""

    path: str
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFound:
    """A manifest on disk when the run was over."""

    job_id: str
    sha256: str
    digest: str
    result: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A message that was in the dead-letter queue when the run was over."""

    body: str
    message_id: str | None = None
    code: str | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A message that was still in a queue when the run was over."""

    queue: str
    body: str
    message_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that was done to the system. For reports; the rules do not look at it."""

    what: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The last record: without it a history is only a beginning."""

    records: int


Record = (
    Run
    | Published
    | CancelAsked
    | Heard
    | Delivered
    | Confirmed
    | Acked
    | HandedBack
    | VideoSeen
    | ManifestFound
    | DeadLetter
    | Left
    | Fault
    | End
)
_KINDS: dict[str, type[Record]] = {kind.__name__: kind for kind in Record.__args__}


def encode_record(record: Record, *, at: float) -> str:
    """One line. `at` is seconds on the monotonic clock of the machine the run was on."""
    return json.dumps({"at": round(at, 4), "kind": type(record).__name__, **asdict(record)}, separators=(",", ":"))


def decode_record(line: str) -> tuple[float, Record]:
    """A line's time and record. Raises HistoryError."""
    try:
        document = json.loads(line)
        at, kind = document.pop("at"), _KINDS[document.pop("kind")]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise HistoryError(f"no record: {line[:200]!r}") from error
    known = {each.name for each in fields(kind)}
    needed = {each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING}
    if not needed <= document.keys() <= known:
        raise HistoryError(f"a {kind.__name__} has other fields: {line[:200]!r}")
    return float(at), kind(**document)


def read_history(folder: Path) -> list[tuple[float, Record]]:
    """All records of a run. Raises HistoryError when there are none, or one does not parse."""
    try:
        lines = (folder / HISTORY).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise HistoryError(f"{folder / HISTORY}: {error.strerror}") from error
    return [decode_record(line) for line in lines]


def read_logs(folder: Path) -> Iterator[tuple[str, str]]:
    """Each line of each log, with the name of its file and its number."""
    for path in sorted((folder / LOGS).glob("*")):
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if line:
                yield f"{path.name}:{number}", line.decode("utf-8", "backslashreplace")


class Recorder:
    """Writes a history, from any thread, in the order of the calls."""

    def __init__(self, folder: Path, run: Run) -> None:
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = threading.Lock()
        self._count = 0
        self._file = (folder / HISTORY).open("w", encoding="utf-8")
        self.add(run)

    def add(self, record: Record) -> None:
        with self._lock:
            self._file.write(encode_record(record, at=time.monotonic()) + "\n")
            self._count += 1

    def close(self) -> None:
        """Says that all was recorded. A run that broke off must not call it."""
        self.add(End(records=self._count))
        self._file.close()


def text_of(short_string: bytes) -> str:
    """A message_id as it stands in a history: text, or for what is no UTF-8 as much Latin-1 as can be sent again."""
    try:
        return short_string.decode()
    except UnicodeDecodeError:
        return short_string.decode("latin-1")[:127]


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str | None:
    """None when there is no such file."""
    try:
        return sha256_of(path.read_bytes())
    except FileNotFoundError:
        return None


def record_output(recorder: Recorder, output: Path) -> None:
    """Records every manifest and every video under the output directory, by what is in the files."""
    for path in sorted(output.glob("*/manifest.json")):
        raw = path.read_bytes()
        manifest = json.loads(raw)
        recorder.add(
            ManifestFound(
                job_id=path.parent.name,
                sha256=sha256_of(raw),
                digest=manifest["request_digest"],
                result=manifest["result"],
            )
        )
        named = Path(manifest["result"]["video"]["path"])
        recorder.add(VideoSeen(path=str(named), sha256=sha256_of_file(named)))


def record_queues(recorder: Recorder, url: str, *, dead: str, others: list[str]) -> None:
    """Takes all that is in the dead-letter queue and in `others`, and records it. Nobody else may consume them."""
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        for queue in (dead, *others):
            # Consumed, not counted: a quorum queue just restarted may claim to hold nothing.
            for method, properties, body in channel.consume(queue, auto_ack=True, inactivity_timeout=2):
                if method is None or properties is None:
                    break
                name = properties.message_id
                message_id = text_of(name) if isinstance(name, bytes) else name
                if queue == dead:
                    headers = properties.headers or {}
                    recorder.add(
                        DeadLetter(
                            body=sha256_of(body),
                            message_id=message_id,
                            code=headers.get("x-reeld-code"),
                            path=headers.get("x-reeld-path"),
                        )
                    )
                else:
                    recorder.add(Left(queue=queue, body=sha256_of(body), message_id=message_id))
            channel.cancel()
