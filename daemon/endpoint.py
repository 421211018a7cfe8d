"""The HTTP endpoint of the launcher: `/metrics`, `/livez` and `/readyz`.

Owns the socket and the answers' form. Leaves out what is answered (`daemon.metrics`, `daemon.vitals`).
"""

import json
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog

from daemon.errors import ConfigError
from daemon.metrics import Metrics
from daemon.sections import MetricsConfig
from daemon.vitals import Reason, Vitals

log = structlog.get_logger("launcher")

_SLOW_CLIENT_SECONDS = 10.0


class Endpoint:
    """Answers from threads of its own between enter and exit. `url` says where.

    Raises ConfigError when the address cannot be had.
    """

    def __init__(self, config: MetricsConfig, metrics: Metrics, vitals: Vitals) -> None:
        address = config.address
        assert address is not None
        handler = type("Handler", (_Handler,), {"metrics": metrics, "vitals": vitals})
        server = _Server6 if ":" in address[0] else _Server
        try:
            self._server = server(address, handler)
        except OSError as error:
            reason = f"{error.strerror or error}; every instance on a box needs a port of its own"
            raise ConfigError(f"metrics.listen {config.listen}: {reason}") from error
        host, port = self._server.server_address[:2]
        host = host.decode() if isinstance(host, bytes) else host
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="endpoint", daemon=True)

    def __enter__(self) -> "Endpoint":
        self._thread.start()
        log.info("metrics_listening", url=self.url)
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    metrics: Metrics
    vitals: Vitals
    timeout = _SLOW_CLIENT_SECONDS
    server_version = "reeld"
    sys_version = ""

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/metrics":
                body, content_type = self.metrics.render(self.headers.get("Accept"))
                self._answer(HTTPStatus.OK, body, content_type)
            case "/livez":
                self._verdict("live", self.vitals.view().live)
            case "/readyz":
                self._verdict("ready", self.vitals.view().ready)
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"/metrics, /livez or /readyz\n", "text/plain")

    do_HEAD = do_GET  # noqa: N815  the base class's name

    def _verdict(self, name: str, reasons: list[Reason]) -> None:
        body = json.dumps({name: not reasons, "reasons": [reason.as_json() for reason in reasons]}) + "\n"
        status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
        self._answer(status, body.encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http", request=format % args)
