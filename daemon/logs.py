"""Logs: one JSON object a line on the process's original stderr, from the first line to the last.

Owns structlog's set-up, and turning everything that others print into log lines: Python's loggers and warnings,
`print`s, progress bars, and what C libraries and child processes write to file descriptors 1 and 2. Leaves out
where the lines go (journald, a pipeline).
"""

import contextlib
import faulthandler
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import types
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog

from daemon import __version__
from daemon.events import now
from daemon.log_file import LogFile
from daemon.signals import STACKS_SIGNAL

LOCK_VARIABLE = "REELD_LOG_LOCK"
# How the launcher's output shall look, which decides for its ranks: these have a pipe.
FORMAT_VARIABLE = "REELD_LOG_FORMAT_RESOLVED"
# Begins a line that a rank has formatted already; the launcher passes it on as it is. (RFC 7464's record separator.)
_FORMATTED = b"\x1e"
# Ends what a process captures of itself. (ASCII's end of transmission.)
_END = b"\x04"
RUNTIME_VARIABLE = "REELD_RUNTIME_DIRECTORY"
# Rank 0 makes this file in the runtime directory once it takes DRAIN_SIGNAL for a wish to drain.
READY_MARK = "ready"
# And this one when a message asked it to drain: if its group fails now, it is not started again.
DRAIN_MARK = "draining"
# This one is there while a group warms up: one that finds it knows that the last group broke there.
WARM_UP_MARK = "warming-up"
# Where a rank writes the stacks of its threads on STACKS_SIGNAL.
STACKS_FILE = "stacks-{rank}.txt"
LAUNCHER_STACKS_FILE = "launcher-stacks.txt"
# Names the launcher's configuration file, for whoever looks at the daemons of a box.
CONFIG_FILE = "config-path"
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


class LineWriter:
    """Writes whole lines to one file descriptor, of which several processes may hold a copy.

    A pipe takes at most PIPE_BUF (4096) bytes in one piece, and a traceback is longer, so the processes of a group
    take turns by a lock on a file that the launcher names.
    """

    def __init__(self, descriptor: int, lock_path: str | None, *, prefix: bytes = b"") -> None:
        self._descriptor = descriptor
        self._prefix = prefix
        self._lock_file = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) if lock_path else None
        # Reentrant, because the launcher's signal handler logs, and may interrupt a line being written.
        self._lock = threading.RLock()

    def write(self, line: str) -> None:
        self.write_bytes(self._prefix + line.encode("utf-8", "backslashreplace") + b"\n")

    def write_bytes(self, data: bytes) -> None:
        with self._lock:
            if self._lock_file is not None:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                pass  # nobody reads the log any more: that must not stop the work
            finally:
                if self._lock_file is not None:
                    fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


class _Capture:
    """A pipe in the place of file descriptors 1 and 2, and a thread that turns its lines into events."""

    def __init__(self, output: LineWriter) -> None:
        self._output = output
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)
        self._reader = reader
        self._thread = threading.Thread(target=self._run, name="log-capture", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        log = structlog.get_logger("captured")
        rest = b""
        while chunk := os.read(self._reader, 65536):
            # Progress bars rewrite their line with a carriage return.
            *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
            for line in lines:
                if line == _END:
                    return
                if line.startswith(_FORMATTED):
                    self._output.write_bytes(line[1:] + b"\n")
                else:
                    self._emit(log, line)
        self._emit(log, rest)

    def _emit(self, log: Any, line: bytes) -> None:
        text = line.decode("utf-8", "backslashreplace").strip()
        if text:
            log.info("captured_output", text=text[:2000])

    def finish(self) -> None:
        """Gives the last lines the time to arrive."""
        sys.stdout.flush()
        sys.stderr.flush()
        # A mark, because the pipe ends only once every child that inherited it has closed it too.
        os.write(1, b"\n" + _END + b"\n")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        self._thread.join(timeout=2)


_capture: _Capture | None = None


def setup_logs(
    *,
    format_: str,
    level: str,
    rank: int | None,
    local_rank: int | None,
    world_size: int | None,
    capture: bool,
    directory: Path | None = None,
) -> None:
    """Sets up the logs of this process. Call it once, first, before anything heavy is imported.

    `format_` is json, console, or auto (console on a terminal). `rank` is None in the launcher. With a `directory` the
    same events also go, as JSON, to a file there (`daemon.log_file`). Raises OSError when that file cannot be opened.
    """
    global _capture
    # Under the launcher, fd 2 of a rank is the launcher's pipe.
    inherited = rank is not None and LOCK_VARIABLE in os.environ
    writer = LineWriter(
        os.dup(2),
        os.environ.get(LOCK_VARIABLE) if inherited else None,
        prefix=_FORMATTED if inherited else b"",
    )
    console = format_ == "console" or (format_ == "auto" and writer.isatty())
    fixed = {
        "service": "reeld",
        "version": __version__,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "rank": rank,
        "local_rank": local_rank,
        "world_size": world_size,
    }

    def add_fixed(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {"timestamp": now(), **{k: v for k, v in event.items() if k not in fixed}, **fixed}

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
    ]
    plain = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    as_json: list[Any] = [
        plain,
        structlog.processors.format_exc_info,
        add_fixed,
        structlog.processors.JSONRenderer(default=str),
    ]
    for_people: list[Any] = [
        plain,
        structlog.processors.TimeStamper("%H:%M:%S", utc=False),
        # rich's tracebacks, the default where it is installed, show variables: a URL with its password, a prompt.
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=for_people if console else as_json
    )

    def say(event: str, level: str, **fields: object) -> None:
        """A line past the handlers, of a fault in them."""
        line = {"timestamp": now(), "level": level, "event": event, "logger": "logs", **fixed, **fields}
        writer.write(json.dumps(line))

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                writer.write(self.format(record))
            except Exception as error:  # noqa: BLE001  a log call must never end the work; the fault itself is logged
                say("log_failed", "error", text=repr(error))

    handler = Handler()
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        name = "launcher" if rank is None else f"rank-{rank}"
        file_handler = LogFile(directory / f"{name}.jsonl", say)
        file_handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=as_json))
        root.addHandler(file_handler)
    root.setLevel(_LEVELS[level])
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    # pika says at INFO what reeld says in its own words.
    # What torch says of ranks that failed, with its own traceback, the launcher says too.
    for silent in ("pika", "torch.multiprocessing.spawn", "torch.distributed.elastic.multiprocessing.api"):
        logging.getLogger(silent).setLevel(logging.CRITICAL)
    for noisy in ("urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    runtime = os.environ.get(RUNTIME_VARIABLE)
    if runtime and rank is not None:
        # The launcher turns this file into a log line when the rank died: a raw trace would not parse.
        faulthandler.enable((Path(runtime) / f"rank-{rank}.txt").open("w"))
        # For the launcher, which asks all ranks when one makes no progress. The handler is C and needs no GIL, so it
        # also answers for a rank whose main thread hangs inside a library.
        faulthandler.register(STACKS_SIGNAL, (Path(runtime) / STACKS_FILE.format(rank=rank)).open("w"))
    if runtime and rank is None:
        faulthandler.register(STACKS_SIGNAL, (Path(runtime) / LAUNCHER_STACKS_FILE).open("w"))
    if capture:
        os.environ.setdefault("TQDM_DISABLE", "1")
        # Libraries that put handlers of their own on their loggers write to the captured descriptors.
        sys.stdout.flush()
        sys.stderr.flush()
        _capture = _Capture(writer)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def leave_mark(path: Path) -> None:
    """Makes one of the files that tell the launcher or the next group something."""
    with contextlib.suppress(OSError):  # a full disk must not keep anybody from draining, or from serving
        path.touch()


def finish_logs() -> None:
    """Writes what is still captured. Call it last."""
    if _capture is not None:
        _capture.finish()


def log_format_for_ranks(format_: str) -> str:
    """What `auto` means for the ranks of a launcher: what it means for the launcher."""
    if format_ != "auto":
        return format_
    return "console" if os.isatty(2) else "json"


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    structlog.get_logger("process").critical("uncaught_exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        structlog.get_logger("process").critical(
            "uncaught_exception_in_thread",
            thread=args.thread.name if args.thread else None,
            exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        )
