"""A network of its own for a daemon, with an address of each kind: public, private, and the cloud's metadata service.

Owns the network namespace and the sockets that a test listens on in it. Nothing leaves it: its only interface is its
loopback, and every address is one of that. Leaves out who answers there.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

PUBLIC = "192.0.9.1"  # of no documentation or private range, so the daemon takes it for anybody's
METADATA = "169.254.169.254"
LOOPBACK = "127.0.0.1"

# Run inside: brings the loopback up, gives it the addresses, hands the listening sockets out, and becomes the daemon.
_ENTER = """
import fcntl, os, socket, struct, sys
path, *rest = sys.argv[1:]
where, command = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
SIOCSIFADDR, SIOCSIFFLAGS, IFF_UP = 0x8916, 0x8914, 1
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    addresses = dict.fromkeys(each.rpartition(":")[0] for each in where)
    for number, address in enumerate(each for each in addresses if not each.startswith("127.")):
        told = struct.pack("16sHH4s8x", b"lo:%d" % number, socket.AF_INET, 0, socket.inet_aton(address))
        fcntl.ioctl(any_socket, SIOCSIFADDR, told)
sockets = []
for each in where:
    address, _, port = each.rpartition(":")
    sockets.append(socket.create_server((address, int(port))))
with socket.socket(socket.AF_UNIX) as out:
    out.connect(path)
    socket.send_fds(out, [b"."], [each.fileno() for each in sockets])
os.execvp(command[0], command)
"""


class Network:
    """The command that starts a process in a network of its own, and the sockets that listen there.

    with Network(folder, [(PUBLIC, 80)]) as network:
        start(network.command("reeld", "run"))
        (public,) = network.sockets()
    """

    def __init__(self, folder: Path, where: Sequence[tuple[str, int]]) -> None:
        self._path = folder / "sockets"
        self._where = where
        self._handover = socket.socket(socket.AF_UNIX)

    def command(self, *command: str) -> list[str]:
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        where = [f"{address}:{port}" for address, port in self._where]
        enter = ["unshare", "--net", *user, sys.executable, "-c", _ENTER, str(self._path), *where]
        return [*enter, "--", *command]

    def sockets(self) -> list[socket.socket]:
        """Waits for the process that was started; its sockets, in the order in which they were asked for."""
        connection, _ = self._handover.accept()
        with connection:
            _, descriptors, _, _ = socket.recv_fds(connection, 1, len(self._where))
        return [socket.socket(fileno=descriptor) for descriptor in descriptors]

    def __enter__(self) -> "Network":
        self._handover.bind(str(self._path))
        self._handover.listen(1)
        self._handover.settimeout(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._handover.close()
