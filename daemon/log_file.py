"""A log file beside the log: it may be moved away, fill its disk or lose its folder, and nobody who logs notices.

Owns keeping up with what happens to the file, and saying once elsewhere that lines are lost, and once that no more are.
Leaves out formats and where else lines go (`daemon.logs`).
"""

import contextlib
import io
import logging
import logging.handlers
import sys
from collections.abc import Callable
from pathlib import Path


class LogFile(logging.handlers.WatchedFileHandler):
    """Appends each record's line. `say(event, level, fields)` must not log: it is called while a record is handled.

    The library's own handler raises into the caller when the file cannot be opened again, and otherwise prints a
    traceback to stderr, which is captured, logged, fails again, and so on.
    """

    def __init__(self, path: Path, say: Callable[..., None]) -> None:
        """Raises OSError when the file cannot be opened."""
        self._say = say
        self._lost = 0
        self._failing = False
        super().__init__(path, encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        self._failing = False
        try:
            super().emit(record)
        except OSError as error:  # of opening it; of writing they go to handleError
            self._fail(error)
        if self._lost and not self._failing:
            self._say("log_file_resumed", "warning", path=self.baseFilename, lines_lost=self._lost)
            self._lost = 0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the library's name
        self._fail(sys.exc_info()[1])

    def _fail(self, error: BaseException | None) -> None:
        self._failing = True
        self._lost += 1
        if self._lost == 1:
            self._say("log_file_failed", "error", path=self.baseFilename, text=repr(error))
        # With what it still holds of the line; the next line opens the file again.
        stream, self.stream = self.stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()

    def _open(self) -> io.TextIOWrapper:
        stream = super()._open()
        if self._lost:
            stream.write("\n")  # the last line may have got half its way
        return stream
