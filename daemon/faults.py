"""The faults of a configuration, gathered until all of them are known.

Leaves out finding them (`daemon.validation`).
"""

import contextlib
from collections.abc import Iterator

from daemon.errors import ConfigError


class Faults:
    """Faults in the order in which they were found, each with the path of its setting, like `models.0.path`."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, path: str, what: str) -> None:
        self._lines.append(f"{path}: {what}")

    @contextlib.contextmanager
    def at(self, path: str, *errors: type[Exception]) -> Iterator[None]:
        """Ends what is within by one of `errors`, which becomes a fault of that setting."""
        try:
            yield
        except errors as error:
            self.add(path, str(error))

    @contextlib.contextmanager
    def gather(self) -> Iterator[None]:
        """Ends what is within by ConfigError, whose lines name their settings themselves."""
        try:
            yield
        except ConfigError as error:
            self._lines += str(error).splitlines()

    def raise_all(self) -> None:
        """Raises ConfigError with every fault, one a line; does nothing when there is none."""
        if self._lines:
            raise ConfigError("\n".join(dict.fromkeys(self._lines)))
