"""A job's inputs: fetched from allowed places only, checked, and staged for the ranks.

Owns the allow-list of schemes and roots, the refusal of private addresses (a name is resolved once for each
connection, and only what was checked is connected to, so that neither DNS nor a redirect gets around it), and the
limits of size, pixels and time. Leaves out retrying (`daemon.coordinator`) and reading the image into tensors
(`parallel.engine`).
"""

import base64
import contextlib
import io
import ipaddress
import os
import socket
import stat
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import urllib3
from PIL import Image
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from daemon.errors import ErrorCode, PermanentJobError, TransientJobError
from daemon.sections import InputsConfig

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_CHUNK_BYTES = 64 * 1024


def stage_image(uri: str, target: Path, config: InputsConfig, *, path: str) -> None:
    """Fetches an image to `target`. `path` is the field that names it, for errors.

    Raises PermanentJobError(input_rejected) for what is not allowed or no image, TransientJobError
    (input_unavailable) for what may come back.
    """
    data = fetch_input(uri, config, path)
    _check_image(data, config, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def fetch_input(uri: str, config: InputsConfig, path: str) -> bytes:
    """The bytes behind a URI, at most `config.max_bytes`. Raises as `stage_image` does, but for what they are."""
    scheme = uri.partition(":")[0].lower()
    if scheme not in config.schemes:
        raise _rejected(f"scheme {scheme[:20]!r} is not allowed (inputs.schemes: {', '.join(config.schemes)})", path)
    match scheme:
        case "file":
            return _read_file(uri, config, path)
        case "data":
            return _decode_data(uri, config, path)
        case _:
            return _get_http(uri, config, path)


def _read_file(uri: str, config: InputsConfig, path: str) -> bytes:
    try:
        parts = urllib.parse.urlsplit(uri)
    except ValueError as error:
        raise _rejected(f"not a URI: {error}", path) from error
    if parts.netloc not in ("", "localhost"):
        raise _rejected("a file: URI must not name a host", path)
    text = urllib.parse.unquote(parts.path)
    if "\0" in text:
        raise _rejected("the file name holds a NUL", path)
    roots = [root.resolve() for root in config.roots]
    try:
        resolved = Path(text).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _rejected("the file is not under one of inputs.roots", path) from error
    # One answer for "outside" and "not there", so that publishers cannot explore the disk.
    if not any(resolved.is_relative_to(root) for root in roots):
        raise _rejected("the file is not under one of inputs.roots", path)
    try:
        # O_NOFOLLOW and O_NONBLOCK: the resolved name must be a plain file now, not a link or a FIFO.
        descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _rejected("not a plain file", path)
            # Where it really is: a folder on the way may have become a link since the name was resolved.
            opened = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if not any(opened.is_relative_to(root) for root in roots):
                raise _rejected("the file is not under one of inputs.roots", path)
            with open(descriptor, "rb", closefd=False) as file:
                return _read_limited(file, config, path)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise _unavailable("there is no such file", path) from error
    except PermissionError as error:
        raise _rejected(f"the file cannot be read: {error.strerror}", path) from error
    except OSError as error:
        raise _unavailable(f"reading failed: {error.strerror}", path) from error


def _read_limited(file: Any, config: InputsConfig, path: str) -> bytes:
    data: bytes = file.read(config.max_bytes + 1)
    if len(data) > config.max_bytes:
        raise _rejected(f"more than {config.max_bytes} bytes", path)
    return data


def _decode_data(uri: str, config: InputsConfig, path: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise _rejected("a data: URI must be base64", path)
    if len(payload) > config.max_bytes * 4 // 3 + 4:
        raise _rejected(f"more than {config.max_bytes} bytes", path)
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise _rejected(f"not base64: {error}", path) from error


class _ForbiddenAddressError(Exception):
    """Raised when a name leads to an address that inputs may not come from."""


_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that IANA gives out for it
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address behind a translator
# Public by their range, but metadata services or the like: IETF protocol assignments (Oracle's 192.0.0.192), and
# the channel from a machine of Azure's to its host.
_OF_THE_CLOUD = (ipaddress.IPv4Network("192.0.0.0/24"), ipaddress.IPv4Network("168.63.129.16/32"))


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            embedded = ipaddress.IPv4Address(address.packed[-4:])
        if embedded is not None:
            return _is_public(embedded)
        return address.is_global and address in _GLOBAL_UNICAST
    return address.is_global and not address.is_multicast and not any(address in each for each in _OF_THE_CLOUD)


def _resolve(host: str, port: int, seconds: float) -> list[str]:
    """The addresses of a name. Raises OSError: TimeoutError too, for getaddrinfo itself knows no limit."""
    answer: Future[list[Any]] = Future()

    def ask() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="resolve", daemon=True).start()  # nobody waits for its end
    try:
        return list(dict.fromkeys(str(each[4][0]) for each in answer.result(seconds)))
    except ValueError as error:  # no name: too long a part of it, for instance
        raise urllib3.exceptions.LocationParseError(host) from error


def _connect(host: str, port: int, config: InputsConfig, deadline: float) -> socket.socket:
    """Raises _ForbiddenAddressError before anything is sent if one of the name's addresses is not allowed, and OSError
    if none can be connected to by `deadline`, of the monotonic clock."""
    addresses = _resolve(host, port, deadline - time.monotonic())
    for address in addresses:
        if not config.allow_private_addresses and not _is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise _ForbiddenAddressError(address)
    failure: OSError = TimeoutError()
    for tried, address in enumerate(addresses):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            break
        try:
            return socket.create_connection((address, port), min(10.0, remaining / (len(addresses) - tried)))
        except OSError as error:
            failure = error
    raise failure


def _pool_manager(schemes: tuple[str, ...], connect: Callable[[str, int], socket.socket]) -> urllib3.PoolManager:
    """A pool manager whose connections `connect` makes; redirects lead to `schemes` only. TLS asks for the name."""

    class OurHTTPConnection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self._dns_host, self.port)

    class OurHTTPSConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self._dns_host, self.port)

    class OurHTTPPool(HTTPConnectionPool):
        ConnectionCls = OurHTTPConnection

    class OurHTTPSPool(HTTPSConnectionPool):
        ConnectionCls = OurHTTPSConnection

    # Retry-After is not obeyed here: the server would choose how long the GPUs wait.
    retries = urllib3.Retry(connect=0, read=0, redirect=3, status=0, other=0, respect_retry_after_header=False)
    manager = urllib3.PoolManager(num_pools=4, retries=retries)
    manager.pool_classes_by_scheme = {"http": OurHTTPPool, "https": OurHTTPSPool}
    manager.key_fn_by_scheme = {name: key for name, key in manager.key_fn_by_scheme.items() if name in schemes}
    return manager


def _get_http(uri: str, config: InputsConfig, path: str) -> bytes:
    deadline = time.monotonic() + config.timeout_seconds
    watched: list[socket.socket] = []
    # A server that says nothing; the deadline is for all that one does.
    silence = min(15.0, config.timeout_seconds)

    def shut() -> None:
        for sock in watched:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def connect(host: str, port: int) -> socket.socket:
        sock = _connect(host, port, config, deadline)
        sock.settimeout(silence)
        watched.append(sock.dup())  # TLS takes the socket itself away
        if time.monotonic() >= deadline:
            shut()
        return sock

    # urllib3's timeouts are for one read each; a server that drips its headers would never meet them.
    guard = threading.Timer(config.timeout_seconds, shut)
    guard.daemon = True
    guard.start()
    manager = _pool_manager(config.schemes, connect)
    try:
        with manager.request("GET", uri, preload_content=False, timeout=silence) as response:
            if response.status >= 500 or response.status in (408, 425, 429):
                raise _unavailable(f"HTTP status {response.status}", path)
            if response.status != 200:
                raise _rejected(f"HTTP status {response.status}", path)
            data = bytearray()
            # Undecoded: a small answer must not unpack into a large one.
            while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
                data += chunk
                if len(data) > config.max_bytes:
                    raise _rejected(f"more than {config.max_bytes} bytes", path)
            if time.monotonic() >= deadline:  # a shut connection can look like a finished one
                raise _unavailable(f"not there after {config.timeout_seconds} s", path)
            return bytes(data)
    except _ForbiddenAddressError as error:
        raise _rejected(f"address {error} is not public (inputs.allow_private_addresses)", path) from error
    except urllib3.exceptions.LocationValueError as error:
        raise _rejected(f"not a URL: {error}"[:300], path) from error
    except urllib3.exceptions.HTTPError as error:
        late = time.monotonic() >= deadline
        reason = f"not there after {config.timeout_seconds} s" if late else type(error).__name__
        raise _unavailable(reason, path) from error
    finally:
        guard.cancel()
        manager.clear()
        for sock in watched:
            sock.close()


def _check_image(data: bytes, config: InputsConfig, path: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
                # The header alone is read so far: a bomb is refused before it is decoded.
                if image.width * image.height > config.max_pixels:
                    raise _rejected(f"{image.width}x{image.height} is more than {config.max_pixels} pixels", path)
                image.load()
    except PermanentJobError:
        raise
    except Exception as error:  # what Pillow raises for hostile bytes is not a closed list
        raise _rejected(f"not a readable {', '.join(_IMAGE_FORMATS)} image: {error}"[:300], path) from error


def _rejected(message: str, path: str) -> PermanentJobError:
    return PermanentJobError(ErrorCode.INPUT_REJECTED, message, path=path)


def _unavailable(message: str, path: str) -> TransientJobError:
    return TransientJobError(ErrorCode.INPUT_UNAVAILABLE, message, path=path)
