"""Names of inputs: resolved once, each of their addresses allowed, and all within the one deadline.

A process fetches in a network of its own (`tests.network`), where the name server is ours.
"""

import ctypes
import json
import os
import select
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.network import LOOPBACK, PUBLIC, Network

_PICTURE = b"a picture"
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# Where nobody answers, not even with a refusal; and an address that getaddrinfo sorts behind them.
_HANGING, _BEHIND = [f"127.0.0.{last}" for last in range(11, 71)], "127.0.1.9"
_NAMES = {
    "public.example": [[PUBLIC]],
    "mixed.example": [[PUBLIC, LOOPBACK]],
    "turning.example": [[PUBLIC], [LOOPBACK]],  # the first answer, and all later ones
    "patient.example": [[*_HANGING[:2], _BEHIND]],
    "hopeless.example": [_HANGING],
    "nat64-public.example": [["64:ff9b::c000:901"]],  # PUBLIC
    "nat64-private.example": [["64:ff9b::a00:1"]],  # 10.0.0.1
}
_FETCH = """
import json, sys
from daemon.errors import JobError
from daemon.inputs import fetch_input
from daemon.sections import InputsConfig

settings, *uris = sys.argv[1:]
for uri in uris:
    try:
        print(fetch_input(uri, InputsConfig(**json.loads(settings)), "inputs.input_image").decode())
    except JobError as error:
        print(f"{error.code}: {error.message}")
"""
# Only files that are there can be hidden by others.
_WITH_OUR_NAMES = """
for name in resolv.conf nsswitch.conf; do if [ -e "/etc/$name" ]; then mount --bind "$1/$name" "/etc/$name"; fi; done
shift
exec "$@"
"""


class Names(socketserver.ThreadingTCPServer):
    """A name server for `_NAMES`; of any other name it says nothing at all."""

    daemon_threads = True

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(listening.getsockname(), _Question, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.asked: list[str] = []  # for IPv4 addresses
        self.closing = threading.Event()


class _Question(socketserver.StreamRequestHandler):
    server: Names

    def handle(self) -> None:
        while len(length := self.rfile.read(2)) == 2:
            query = self.rfile.read(int.from_bytes(length))
            end = query.index(b"\0", 12) + 5  # of the one question: name, type, class
            labels, rest = [], query[12 : end - 5]
            while rest:
                labels.append(rest[1 : 1 + rest[0]].decode())
                rest = rest[1 + rest[0] :]
            name, kind = ".".join(labels), int.from_bytes(query[end - 4 : end - 2])
            if name not in _NAMES:
                self.server.closing.wait()
                return
            answers = _NAMES[name][min(self.server.asked.count(name), len(_NAMES[name]) - 1)]
            if kind == 1:
                self.server.asked.append(name)
            packed = [ip_address(each).packed for each in answers]
            found = [each for each in packed if len(each) == {1: 4, 28: 16}.get(kind)]
            records = b"".join(struct.pack("!HHHIH", 0xC00C, kind, 1, 0, len(each)) + each for each in found)
            reply = query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(found), 0, 0) + query[12:end] + records
            self.wfile.write(len(reply).to_bytes(2) + reply)


class Site(ThreadingHTTPServer):
    """Serves `_PICTURE` on a socket that listens already, and keeps the names it was asked by."""

    daemon_threads = True

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(listening.getsockname(), _Page, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.hosts: list[str | None] = []


class _Page(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(_PICTURE)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _drop_all(listening: socket.socket) -> None:
    """No packet reaches the socket any more, so that connecting to it hangs."""
    refuse_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0 bytes
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(refuse_all)))


@contextmanager
def _served(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Scene:
    """A name server, servers at some addresses, and at 127.0.0.1 one that nobody may connect to."""

    names: Names
    public: Site

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "resolv.conf").write_text(f"nameserver {LOOPBACK}\noptions use-vc timeout:30 attempts:5\n")
        (folder / "nsswitch.conf").write_text("hosts: dns\n")

    def fetch(self, *uris: str, certificate: str = "", **settings: object) -> list[str]:
        """What each URI gave, one after the other in one process: `_PICTURE`, or the error's code and message."""
        where = [(LOOPBACK, 53), (PUBLIC, 80), (PUBLIC, 443), (_BEHIND, 80), (LOOPBACK, 80)]
        settings = {"schemes": ("http", "https")} | settings
        fetch = [sys.executable, "-c", _FETCH, json.dumps(settings), *uris]
        enter = ["unshare", "--mount", "sh", "-euc", _WITH_OUR_NAMES, "sh", str(self._folder), *fetch]
        with ExitStack() as stack:
            network = stack.enter_context(Network(self._folder, [*where, *((each, 80) for each in _HANGING)]))
            environment = {**os.environ, "SSL_CERT_FILE": str(self._folder / "ca.pem")}
            process = subprocess.Popen(network.command(*enter), stdout=subprocess.PIPE, text=True, env=environment)
            stack.enter_context(process)
            stack.callback(process.kill)
            names, public, secure, behind, secret, *hanging = network.sockets()
            for each in hanging:
                _drop_all(each)
                stack.enter_context(each)
            self.names, self.public = Names(names), Site(public)
            stack.enter_context(secret)
            stack.enter_context(_served(self.names))
            stack.callback(self.names.closing.set)
            stack.enter_context(_served(self.public))
            stack.enter_context(_served(Site(behind)))
            if certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self._folder / f"{certificate}.pem", self._folder / f"{certificate}.key")
                secure = context.wrap_socket(secure, server_side=True)
                stack.enter_context(_served(Site(secure)))
            else:
                stack.enter_context(secure)
            lines = process.communicate(timeout=45)[0].splitlines()  # what would hang for minutes is a failure
            assert not select.select([secret], [], [], 0)[0], "somebody connected to 127.0.0.1"
        (self._folder / "sockets").unlink()
        return lines


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_row_29_a_name_is_resolved_once(scene: Scene) -> None:
    """A name that is public when it is checked and private afterwards leads nowhere else: one question, one answer."""
    first, second = scene.fetch("http://turning.example/a.png", "http://turning.example/a.png")
    assert first == _PICTURE.decode()
    assert second == "input_rejected: address 127.0.0.1 is not public (inputs.allow_private_addresses)"
    assert scene.names.asked == ["turning.example"] * 2
    assert scene.public.hosts == ["turning.example"]


def test_row_29_each_address_of_a_name_must_be_allowed(scene: Scene) -> None:
    """One private address among public ones is one too many, and none of them hears of it."""
    assert scene.fetch("http://public.example/a.png", "http://mixed.example/a.png") == [
        _PICTURE.decode(),
        "input_rejected: address 127.0.0.1 is not public (inputs.allow_private_addresses)",
    ]
    assert scene.public.hosts == ["public.example"]


def test_row_29_addresses_of_nat64_are_those_behind_it(scene: Scene) -> None:
    """In a network with IPv6 only, each public server has such an address: it is tried. A private one is not."""
    public, private = scene.fetch("http://nat64-public.example/", "http://nat64-private.example/")
    assert public.startswith("input_unavailable")  # there is no way to it here
    assert private.startswith("input_rejected: address 64:ff9b::a00:1 is not public")


def test_row_29_a_name_server_that_says_nothing_meets_the_deadline(scene: Scene) -> None:
    """getaddrinfo would wait for minutes here, and knows no limit."""
    assert scene.fetch("http://silent.example/a.png", timeout_seconds=1) == ["input_unavailable: not there after 1.0 s"]


def test_row_29_many_addresses_share_the_deadline(scene: Scene) -> None:
    """Sixty addresses that do not answer do not take sixty times as long as one."""
    lines = scene.fetch("http://hopeless.example/a.png", allow_private_addresses=True, timeout_seconds=1)
    assert lines == ["input_unavailable: not there after 1.0 s"]


def test_an_address_that_hangs_leaves_time_for_the_next(scene: Scene) -> None:
    """The last of three addresses answers, and the picture is there within the limit."""
    lines = scene.fetch("http://patient.example/a.png", allow_private_addresses=True, timeout_seconds=6)
    assert lines == [_PICTURE.decode()]


def test_https_asks_for_the_name_and_not_for_an_address(scene: Scene, tmp_path: Path) -> None:
    """The certificate must be of the name in the URL, signed by somebody we trust; that of another name will not do."""
    _certificates(tmp_path, "public.example", "other.example")
    assert scene.fetch("https://public.example/a.png", certificate="public.example") == [_PICTURE.decode()]
    (refused,) = scene.fetch("https://public.example/a.png", certificate="other.example")
    assert refused.startswith("input_unavailable")
    (refused,) = scene.fetch(f"https://{PUBLIC}/a.png", certificate="public.example")
    assert refused.startswith("input_unavailable")


def _certificates(folder: Path, *names: str) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-days", "2", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    for name in names:
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text(f"subjectAltName = DNS:{name}\n")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "names", "-out", f"{name}.pem")  # fmt: skip
