"""Inputs come from allowed places only, within their limits, and in time."""

import base64
import io
import os
import select
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from daemon.errors import ErrorCode, PermanentJobError, TransientJobError
from daemon.inputs import stage_image
from daemon.sections import InputsConfig
from tests.pictures import png_header

FIELD = "inputs.input_image"


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 40)).save(buffer, kind)
    return buffer.getvalue()


PNG = picture()


class Place:
    """A root with inputs and a target outside it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.outside = folder / "outside.png"
        self.outside.write_bytes(PNG)
        self.target = folder / "work" / "job-1" / "input_image"

    def stage(self, uri: str, **settings: Any) -> bytes:
        settings = {"schemes": ("file", "http", "https", "data"), "roots": (self.root,)} | settings
        stage_image(uri, self.target, InputsConfig(**settings), path=FIELD)
        return self.target.read_bytes()

    def rejected(self, uri: str, **settings: Any) -> str:
        with pytest.raises(PermanentJobError) as caught:
            self.stage(uri, **settings)
        assert (caught.value.code, caught.value.path) == (ErrorCode.INPUT_REJECTED, FIELD)
        assert not self.target.exists()
        return caught.value.message

    def unavailable(self, uri: str, **settings: Any) -> str:
        with pytest.raises(TransientJobError) as caught:
            self.stage(uri, **settings)
        assert (caught.value.code, caught.value.path) == (ErrorCode.INPUT_UNAVAILABLE, FIELD)
        assert not self.target.exists()
        return caught.value.message


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_under_a_root_is_staged_byte_by_byte(place: Place, kind: str) -> None:
    """A picture in a root's folder is copied as it is, spaces in its name included."""
    folder = place.root / "sub folder"
    folder.mkdir()
    (folder / "first.img").write_bytes(picture(kind))
    assert place.stage((folder / "first.img").as_uri()) == picture(kind)


def test_a_link_inside_the_root_is_followed(place: Place) -> None:
    """Where a link ends is what counts."""
    (place.root / "real.png").write_bytes(PNG)
    (place.root / "link.png").symlink_to("real.png")
    assert place.stage(f"file://localhost{place.root}/link.png") == PNG


def test_row_29_what_is_not_under_a_root_is_rejected(place: Place) -> None:
    """Links, dots, encoded dots, loops and other places get one and the same answer, there or not."""
    (place.root / "link.png").symlink_to(place.outside)
    (place.root / "folder").symlink_to(place.outside.parent)
    (place.root / "loop").symlink_to("loop")
    uris = [
        f"file://{place.root}/link.png",
        f"file://{place.root}/folder/outside.png",
        f"file://{place.root}/../outside.png",
        f"file://{place.root}/%2e%2e/outside.png",
        f"file://{place.root}/loop",
        f"file://{place.root}-of-another/x.png",
        "file:///etc/passwd",
        "file:///etc/not-there",
        "file:outside.png",
    ]
    assert {place.rejected(uri) for uri in uris} == {"the file is not under one of inputs.roots"}


def test_row_29_a_folder_that_becomes_a_link_leads_nowhere(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened counts: a folder that is swapped after the look at its name does not lead outside."""
    folder = place.root / "folder"
    folder.mkdir()
    (folder / "outside.png").write_bytes(PNG)
    assert place.stage((folder / "outside.png").as_uri()) == PNG
    place.target.unlink()
    really_open = os.open

    def swap_and_open(path: Any, *arguments: Any, **options: Any) -> int:  # the moment cannot be had otherwise
        if str(path).endswith("outside.png"):
            folder.rename(place.root / "folder.old")
            folder.symlink_to(place.outside.parent)
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", swap_and_open)
    before = len(os.listdir("/proc/self/fd"))
    assert place.rejected((folder / "outside.png").as_uri()) == "the file is not under one of inputs.roots"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_root_may_be_a_link(place: Place, tmp_path: Path) -> None:
    """Where the root leads is what files must be under."""
    (place.root / "a.png").write_bytes(PNG)
    (tmp_path / "link").symlink_to(place.root)
    assert place.stage(f"file://{tmp_path}/link/a.png", roots=(tmp_path / "link",)) == PNG


def test_without_roots_no_file_is_read(place: Place) -> None:
    """The scheme alone opens nothing."""
    assert "inputs.roots" in place.rejected(place.outside.as_uri(), roots=())


@pytest.mark.parametrize(
    "uri",
    [
        "file://example.org/x.png",
        "file:///a%00b",
        "file://[x/y.png",
        "http://[x/y.png",
        "http://",
        "https:",
        f"http://{'a' * 64}.example/x.png",
        "http://a..example/x.png",
    ],
)
def test_a_uri_that_means_nothing_is_rejected(place: Place, uri: str) -> None:
    """A host in a file: URI, a NUL, or no URI at all is the publisher's mistake."""
    place.rejected(uri)


def test_a_fifo_is_rejected_at_once(place: Place) -> None:
    """A FIFO without a writer, and one with a writer that says nothing, do not hold the worker."""
    fifo = place.root / "fifo"
    os.mkfifo(fifo)
    begun = time.monotonic()
    assert place.rejected(fifo.as_uri()) == "not a plain file"
    writer = os.open(fifo, os.O_RDWR)
    try:
        assert place.rejected(fifo.as_uri()) == "not a plain file"
    finally:
        os.close(writer)
    assert time.monotonic() - begun < 20


def test_a_folder_is_rejected(place: Place) -> None:
    """A folder under a root is no picture, and leaves no descriptor open."""
    before = len(os.listdir("/proc/self/fd"))
    assert place.rejected(place.root.as_uri()) == "not a plain file"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_missing_may_still_come(place: Place) -> None:
    """A missing file under a root is tried again."""
    assert place.unavailable(f"file://{place.root}/later.png") == "there is no such file"


def test_row_21_a_file_over_the_limit_is_rejected(place: Place) -> None:
    """max_bytes is the most, to the byte."""
    (place.root / "a.png").write_bytes(PNG)
    uri = (place.root / "a.png").as_uri()
    assert place.rejected(uri, max_bytes=len(PNG) - 1) == f"more than {len(PNG) - 1} bytes"
    assert place.stage(uri, max_bytes=len(PNG)) == PNG


def test_a_data_uri_carries_the_picture_itself(place: Place) -> None:
    """base64 in the URI needs no place to fetch from."""
    assert place.stage("data:image/png;base64," + base64.b64encode(PNG).decode()) == PNG


@pytest.mark.parametrize(
    "uri",
    [
        "data:",
        "data:image/png;base64",
        "data:image/png,abc",
        "data:;base64,a",
        "data:;base64,ä",
        "data:;base64,",
    ],
)
def test_a_data_uri_that_is_not_base64_of_a_picture_is_rejected(place: Place, uri: str) -> None:
    """No base64, broken base64 and no picture in it are the publisher's mistake."""
    place.rejected(uri)


def test_a_data_uri_over_the_limit_is_rejected(place: Place) -> None:
    """max_bytes counts for data: too."""
    assert "more than 64 bytes" in place.rejected("data:;base64," + "A" * 100, max_bytes=64)


@pytest.mark.parametrize("uri", ["ftp://example.org/a.png", "", "no scheme", "/etc/passwd", "gopher:x"])
def test_a_scheme_that_is_not_allowed_is_rejected(place: Place, uri: str) -> None:
    """Only the schemes of the configuration are open; file: and http: are not among the defaults."""
    assert "inputs.schemes" in place.rejected(uri)
    assert InputsConfig().schemes == ("https", "data")


def test_row_21_a_bomb_is_refused_by_its_header(place: Place) -> None:
    """A picture over max_pixels is refused before one pixel is decoded, however small its file is."""
    bomb = place.root / "bomb.png"
    bomb.write_bytes(png_header(60_000, 60_000))
    place.rejected(bomb.as_uri())
    bomb.write_bytes(png_header(10_000, 10_000))
    assert place.rejected(bomb.as_uri()) == "10000x10000 is more than 50000000 pixels"


@pytest.mark.parametrize(
    "data",
    [b"", b"plain text", PNG[:45], png_header(8, 6), picture("GIF"), picture("BMP"), b"\xff\xd8\xff\xe0"],
    ids=["empty", "text", "cut", "header", "gif", "bmp", "jpeg-start"],
)
def test_what_is_no_picture_is_rejected(place: Place, data: bytes) -> None:
    """Text, a torn file and a format that is not offered are refused before any GPU works on them."""
    (place.root / "x.png").write_bytes(data)
    assert "not a readable PNG, JPEG, WEBP image" in place.rejected((place.root / "x.png").as_uri())


class Site(ThreadingHTTPServer):
    """A real HTTP server on 127.0.0.1 that also counts its requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), SiteHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class SiteHandler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        pages: dict[str, Callable[[], None]] = {
            "/a.png": lambda: self.answer(200, PNG),
            "/moved": lambda: self.answer(302, b"", Location="/a.png"),
            "/loop": lambda: self.answer(302, b"", Location="/loop"),
            "/to-https": lambda: self.answer(302, b"", Location=self.server.url.replace("http", "https")),
            "/to-file": lambda: self.answer(302, b"", Location="file:///etc/passwd"),
            "/busy": lambda: self.answer(503, b"", **{"Retry-After": "3600"}),
            "/large": lambda: self.answer(200, b"x" * 100_000),
            "/packed": lambda: self.answer(200, zlib.compress(PNG), **{"Content-Encoding": "deflate"}),
            "/drip": lambda: self.drip(b"HTTP/1.1 200 OK\r\n\r\n"),
            "/drip-headers": lambda: self.drip(b"HTTP/1.1 200 OK\r\nX: "),
            "/cut": lambda: self.answer(200, PNG[:20], **{"Content-Length": str(len(PNG))}),
        }
        pages.get(self.path, lambda: self.answer(404, b"no"))()

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def drip(self, start: bytes) -> None:
        try:
            self.wfile.write(start)
            while not self.server.closing.wait(0.05):
                self.wfile.write(b"x")
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def test_row_29_a_private_address_gets_no_request(place: Place, site: Site) -> None:
    """By default no byte is sent to an address that is not public, whatever its name."""
    assert "127.0.0.1 is not public" in place.rejected(site.url + "/a.png")
    assert "is not public" in place.rejected(f"http://localhost:{site.server_port}/a.png")
    assert "is not public" in place.rejected(f"http://[::ffff:127.0.0.1]:{site.server_port}/a.png")
    assert "is not public" in place.rejected(site.url.replace("http", "https") + "/a.png")
    assert site.paths == []


def test_row_29_a_private_address_gets_no_connection(place: Place) -> None:
    """Whether something listens there is not told: one answer for both, and what listens hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        listened_to = place.rejected(uri)
        assert not select.select([server], [], [], 0)[0], "somebody connected"
        assert listened_to == place.rejected("http://127.0.0.1:1/a.png")


@pytest.mark.parametrize(
    "host",
    [
        "10.0.0.5",
        "100.100.100.200",  # a metadata service
        "192.0.0.192",  # another
        "168.63.129.16",  # and the channel to a hypervisor, by its range a public address
        "255.255.255.255",
        "224.0.0.1",
        "[::]",
        "[fd00::1]",
        "[fe80::1]",
        "[fec0::1]",
        "[ff02::1]",
        "[::ffff:10.0.0.5]",
        "[::10.0.0.5]",
        "[::ffff:0:10.0.0.5]",
        "[64:ff9b::10.0.0.5]",
        "[64:ff9b:1::10.0.0.5]",
        "[2002:a00:5::1]",  # 6to4
        "[2001:0:a00:5::1]",  # Teredo
    ],
)
def test_row_29_addresses_in_other_clothes_are_refused(place: Place, host: str) -> None:
    """An IPv4 address inside an IPv6 one counts as what it is, and so do addresses that nobody was given."""
    assert "is not public" in place.rejected(f"http://{host}:1/a.png")


def test_a_private_address_is_allowed_where_it_is_configured(place: Place, site: Site) -> None:
    """A picture comes from inside the network when the operator says so; redirects are followed."""
    assert place.stage(site.url + "/a.png", allow_private_addresses=True) == PNG
    assert place.stage(site.url + "/moved", allow_private_addresses=True) == PNG


@pytest.mark.parametrize("page", ["/to-https", "/to-file"])
def test_row_29_a_redirect_leads_to_no_other_scheme(place: Place, site: Site, page: str) -> None:
    """The allowed schemes hold for every hop, not only for the first."""
    message = place.rejected(site.url + page, schemes=("http",), allow_private_addresses=True)
    assert message.startswith("not a URL")
    assert site.paths == [page]


def test_a_circle_of_redirects_ends(place: Place, site: Site) -> None:
    """After three redirects nobody looks further."""
    place.unavailable(site.url + "/loop", allow_private_addresses=True)
    assert len(site.paths) == 4


def test_statuses_say_whether_trying_again_helps(place: Place, site: Site) -> None:
    """404 is the publisher's mistake; 503 passes, and its Retry-After does not make the GPUs wait here."""
    assert place.rejected(site.url + "/missing", allow_private_addresses=True) == "HTTP status 404"
    assert place.unavailable(site.url + "/busy", allow_private_addresses=True) == "HTTP status 503"
    assert site.paths == ["/missing", "/busy"]


def test_row_21_a_download_over_the_limit_is_rejected(place: Place, site: Site) -> None:
    """More than max_bytes is not read to its end."""
    settings = {"allow_private_addresses": True, "max_bytes": 50_000}
    assert place.rejected(site.url + "/large", **settings) == "more than 50000 bytes"


def test_a_packed_answer_is_not_unpacked(place: Place, site: Site) -> None:
    """We never ask for compression, so an answer that could grow without limit is no picture."""
    assert "not a readable" in place.rejected(site.url + "/packed", allow_private_addresses=True)


def test_a_torn_download_may_be_tried_again(place: Place, site: Site) -> None:
    """Fewer bytes than promised are never taken for the picture."""
    place.unavailable(site.url + "/cut", allow_private_addresses=True)


@pytest.mark.parametrize("page", ["/drip", "/drip-headers"])
def test_row_29_a_server_that_drips_meets_the_deadline(place: Place, site: Site, page: str) -> None:
    """A byte now and then, of the body or of the headers, does not keep a download alive."""
    begun = time.monotonic()
    message = place.unavailable(site.url + page, allow_private_addresses=True, timeout_seconds=0.6)
    assert message == "not there after 0.6 s"
    assert time.monotonic() - begun < 20


def test_a_server_that_is_away_may_come_back(place: Place) -> None:
    """A refused connection is tried again."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers here
        place.unavailable(f"http://127.0.0.1:{sock.getsockname()[1]}/a.png", allow_private_addresses=True)
