"""sd_notify(3): what this process tells the service manager that started it.

Owns the datagrams and the three variables of the protocol, which it takes out of the environment: a rank that
inherited them could speak for the unit. Leaves out what is said and when (`daemon.service_state`).
"""

import os
import socket
from collections.abc import MutableMapping

_SEND_SECONDS = 1.0


class Notifier:
    """Where NOTIFY_SOCKET points to; without one, what is sent goes nowhere."""

    def __init__(self, address: str | None, *, watchdog_seconds: float | None = None) -> None:
        self._address = address
        # How long the manager waits for a WATCHDOG=1; None: it does not.
        self.watchdog_seconds = watchdog_seconds

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> "Notifier":
        """Takes the protocol's variables out of `environment`. Reads them leniently: nobody types them by hand."""
        address = environment.pop("NOTIFY_SOCKET", None)
        microseconds = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        seconds = int(microseconds) / 1e6 if watched and microseconds.isdigit() and int(microseconds) > 0 else None
        return cls(_address(address), watchdog_seconds=seconds)

    def send(self, **assignments: str | int) -> bool:
        """Sends `NAME=value` lines in one datagram. Returns whether the manager has it; it must not stop the work."""
        if self._address is None:
            return False
        text = "\n".join(f"{name}={' '.join(str(value).splitlines())}" for name, value in assignments.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_SECONDS)
                sender.sendto(text.encode("utf-8", "backslashreplace"), self._address)
        except OSError:
            return False
        return True


def _address(text: str | None) -> str | None:
    """A path, or a name in the abstract namespace, which begins with @ in the variable and with NUL for the kernel."""
    if text is None or not text.startswith(("/", "@")):
        return None
    return "\0" + text[1:] if text.startswith("@") else text
