"""Row 29 of the fault matrix, end to end: a real worker, real messages, real servers where it must not go. And row 22
for inputs: a work disk that is full.

The worker has a network of its own (`tests.network`), so that there is a public address whose server redirects, and a
metadata service that must not hear of it; and as its work directory a small tmpfs. Each limit by itself is shown in
`tests/unit/test_inputs.py` and `test_media.py`.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
from PIL import Image

from ops.private_broker import PrivateBroker
from tests.broker.daemon_under_fault import TOPOLOGY, DaemonUnderFault, daemon_config, prepare_broker
from tests.harness import Worker, fresh_vhost, job, take
from tests.network import LOOPBACK, METADATA, PUBLIC, Network
from tests.proxy import Proxy

_BROKER_PORT, _SECRET_PORT = 5672, 8080
_SECRET = f"http://{LOOPBACK}:{_SECRET_PORT}/picture.png"
_TIMEOUT_SECONDS = 2
# Beyond the ladder: what may pass fails at once.
_LAST_ATTEMPT = {"x-reeld-attempt": 4}
_WITH_SMALL_DISK = 'mkdir -p "$1"; mount -t tmpfs -o size=4m tmpfs "$1"; shift; exec "$@"'

# Pages of the public server that lead elsewhere.
_REDIRECTS = {
    "/to-loopback": _SECRET,
    "/to-localhost": f"http://localhost:{_SECRET_PORT}/picture.png",
    "/to-metadata": f"http://{METADATA}/latest/meta-data/",
    "/to-file": "file:///etc/passwd",
}


class Site(ThreadingHTTPServer):
    """Serves a picture on a socket that listens already, keeps what it was asked for, and counts who connected."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, picture: bytes) -> None:
        super().__init__(listening.getsockname(), _Pages, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.picture = picture
        self.asked: list[str] = []
        self.connections = 0
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    def end(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Pages(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path == "/drip":
            self.drip()
        elif target := _REDIRECTS.get(self.path):
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.picture)))
            self.end_headers()
            self.wfile.write(self.server.picture)

    def drip(self) -> None:
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while not self.server.closing.wait(0.1):
                self.wfile.write(b"x")
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


class Scene:
    """A daemon, and who must not hear of it: `secret` on its loopback, `metadata`, and a file outside of its roots."""

    def __init__(self, daemon: DaemonUnderFault, sites: list[Site], roots: Path, outside: Path) -> None:
        self.daemon, self.roots, self.outside = daemon, roots, outside
        self.public, self.metadata, self.secret = sites

    def refused(self, uri: str, *, code: str = "input_rejected") -> str:
        """Checks that a job with this input is refused, and that nobody was even connected to. Returns the reason."""
        body = json.dumps(job(job_id="ID", task="image_to_video", inputs={"input_image": uri})).encode()
        reason = self.daemon.check_refused(body, code=code, path="inputs.input_image", headers=_LAST_ATTEMPT)
        assert self.secret.connections == self.metadata.connections == 0
        assert "root:" not in reason, "what a file holds"
        return reason


@pytest.fixture(scope="module")
def scene(broker: PrivateBroker, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("inputs")
    roots = folder / "roots"
    roots.mkdir()
    outside = folder / "outside.png"
    Image.new("RGB", (96, 64), "teal").save(outside)
    config = daemon_config(folder, models)
    inputs = f'schemes = ["file", "http"]\nroots = ["{roots}"]\ntimeout_seconds = {_TIMEOUT_SECONDS}'
    config.write_text(config.read_text().replace(f'schemes = ["file"]\nroots = ["{folder}"]', inputs))
    reeld = str(Path(sys.executable).parent / "reeld")
    where = [(LOOPBACK, _BROKER_PORT), (PUBLIC, 80), (METADATA, 80), (LOOPBACK, _SECRET_PORT)]
    with fresh_vhost(broker) as url, Network(folder, where) as network:
        prepare_broker(url)
        inside = url.replace(f":{broker.amqp_port}/", f":{_BROKER_PORT}/")
        on_small_disk = ["unshare", "--mount", "sh", "-euc", _WITH_SMALL_DISK, "sh", str(folder / "work")]
        command = network.command(*on_small_disk, reeld, "run", "--config", str(config))
        worker = Worker(config, inside, folder, command=command)
        sites: list[Site] = []
        try:
            to_broker, *others = network.sockets()
            sites += [Site(each, outside.read_bytes()) for each in others]
            with Proxy(broker.amqp_port, listening=to_broker) as proxy:
                worker.wait_log("consuming")
                yield Scene(DaemonUnderFault(worker, proxy, url, folder), sites, roots, outside)
                worker.logs()
        finally:
            worker.end()
            for site in sites:
                site.end()


def test_row_29_what_may_be_fetched_is(scene: Scene) -> None:
    """A picture of a public server is fetched: the refusals below are none of a network that does not work."""
    job_id = scene.daemon.publish(
        job(task="image_to_video", inputs={"input_image": f"http://{PUBLIC}/picture.png"}), headers=_LAST_ATTEMPT
    )
    scene.daemon.worker.wait_log("job_succeeded", job_id=job_id)
    assert scene.public.asked == ["/picture.png"]


def test_row_29_hostile_paths_are_refused(scene: Scene) -> None:
    """file:///etc/passwd, ways out by `..`, and symbolic links that lead out: one answer for all, and nothing read."""
    (scene.roots / "link.png").symlink_to(scene.outside)
    (scene.roots / "folder").symlink_to(scene.outside.parent)
    os.utime(scene.outside, (0, os.stat(scene.outside).st_mtime))  # a read would set the time of access
    reasons = {
        scene.refused(uri)
        for uri in (
            "file:///etc/passwd",
            f"file://{scene.roots}/../outside.png",
            f"file://{scene.roots}/%2e%2e/outside.png",
            (scene.roots / "link.png").as_uri(),
            (scene.roots / "folder" / "outside.png").as_uri(),
            (scene.roots.parent / "not-there.png").as_uri(),
        )
    }
    assert reasons == {"the file is not under one of inputs.roots"}
    assert os.stat(scene.outside).st_atime == 0
    scene.outside.read_bytes()
    assert os.stat(scene.outside).st_atime > 0, "this file system keeps no times of access"


@pytest.mark.parametrize(
    "host",
    [f"{LOOPBACK}:{_SECRET_PORT}", f"localhost:{_SECRET_PORT}", f"[::ffff:{LOOPBACK}]:{_SECRET_PORT}",
     f"0.0.0.0:{_SECRET_PORT}", f"2130706433:{_SECRET_PORT}", METADATA],
)  # fmt: skip
def test_row_29_private_addresses_are_refused(scene: Scene, host: str) -> None:
    """Loopback in each of its spellings and the metadata service get no connection, though something answers there."""
    assert "is not public" in scene.refused(f"http://{host}/picture.png")


def test_row_29_private_ports_are_not_told_apart(scene: Scene) -> None:
    """A port where nothing listens gets the answer of one where something does."""
    reasons = {scene.refused(f"http://{LOOPBACK}:{port}/picture.png") for port in (_SECRET_PORT, _SECRET_PORT + 1)}
    assert len(reasons) == 1


@pytest.mark.parametrize("page", _REDIRECTS)
def test_row_29_redirects_lead_nowhere_else(scene: Scene, page: str) -> None:
    """A public server cannot send the worker to its own loopback, to the metadata service or to a file."""
    scene.refused(f"http://{PUBLIC}{page}")
    assert page in scene.public.asked


def test_row_29_a_server_that_drips_meets_the_deadline(scene: Scene) -> None:
    """A server that sends a byte now and then holds the worker for inputs.timeout_seconds and no longer."""
    reason = scene.refused(f"http://{PUBLIC}/drip", code="input_unavailable")
    assert reason == f"not there after {_TIMEOUT_SECONDS}.0 s"


def test_row_22_a_video_that_the_work_disk_has_no_room_for_is_tried_again(scene: Scene) -> None:
    """Its frames take 11 MiB, of 4: the job is tried in place and, after its last attempt, failed; the worker lives."""
    video = scene.roots / "grey.mp4"
    source = ("-f", "lavfi", "-i", "color=gray:size=64x64:rate=8", "-frames:v", "9")
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, str(video)], check=True)
    job_id = scene.daemon.publish(
        job(
            task="video_to_video",
            inputs={"input_video": video.as_uri()},
            parameters={"height": 640, "width": 640, "num_frames": 9, "num_inference_steps": 4},
        ),
        headers=_LAST_ATTEMPT,
    )
    retried = scene.daemon.worker.wait_log("retrying_in_place", job_id=job_id)
    assert retried["code"] == "storage_unavailable"
    assert "No space left on device" in retried["reason"]
    scene.daemon.check_serves()
    (letter,) = take(scene.daemon.url, TOPOLOGY.dead_queue)
    assert letter[0].headers["x-reeld-code"] == "storage_unavailable"
    work = Path(f"/proc/{scene.daemon.rank0()}/root{scene.roots.parent}/work")
    assert [path for path in work.rglob("*") if job_id in str(path)] == [], "nothing is left of it"
