"""A job's inputs: fetched from allowed places only, checked, and staged for the ranks.

Owns the allow-list of schemes and roots, the refusal of private addresses (checked on the connected socket,
so that neither DNS nor a redirect gets around it), and the limits of size and pixels. Leaves out retrying
(`daemon.coordinator`) and reading the image into tensors (`parallel.engine`).
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
    """Raised when a name led to an address that inputs may not come from."""


def _check_peer(sock: socket.socket) -> None:
    # Before a byte is sent: the address that was really connected to is the one that counts.
    address = ipaddress.ip_address(sock.getpeername()[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if not address.is_global or address.is_multicast:
        sock.close()
        raise _ForbiddenAddressError(str(address))


def _pool_manager(schemes: tuple[str, ...], on_connect: Callable[[socket.socket], None]) -> urllib3.PoolManager:
    """A pool manager that shows `on_connect` every new connection; redirects lead to `schemes` only."""

    class WatchedHTTPConnection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            on_connect(sock)
            return sock

    class WatchedHTTPSConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            on_connect(sock)
            return sock

    class WatchedHTTPPool(HTTPConnectionPool):
        ConnectionCls = WatchedHTTPConnection

    class WatchedHTTPSPool(HTTPSConnectionPool):
        ConnectionCls = WatchedHTTPSConnection

    # Retry-After is not obeyed here: the server would choose how long the GPUs wait.
    retries = urllib3.Retry(connect=0, read=0, redirect=3, status=0, other=0, respect_retry_after_header=False)
    manager = urllib3.PoolManager(num_pools=4, retries=retries)
    manager.pool_classes_by_scheme = {"http": WatchedHTTPPool, "https": WatchedHTTPSPool}
    manager.key_fn_by_scheme = {name: key for name, key in manager.key_fn_by_scheme.items() if name in schemes}
    return manager


def _get_http(uri: str, config: InputsConfig, path: str) -> bytes:
    deadline = time.monotonic() + config.timeout_seconds
    watched: list[socket.socket] = []

    def shut() -> None:
        for sock in watched:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def on_connect(sock: socket.socket) -> None:
        if not config.allow_private_addresses:
            _check_peer(sock)
        watched.append(sock.dup())  # TLS takes the socket itself away
        if time.monotonic() >= deadline:
            shut()

    # urllib3's timeouts are for one read each; a server that drips its headers would never meet them.
    guard = threading.Timer(config.timeout_seconds, shut)
    guard.daemon = True
    guard.start()
    manager = _pool_manager(config.schemes, on_connect)
    timeout = urllib3.Timeout(connect=min(10.0, config.timeout_seconds), read=min(15.0, config.timeout_seconds))
    try:
        with manager.request("GET", uri, preload_content=False, timeout=timeout) as response:
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
