"""Videos and audio are decoded within bounds, and what is not one is refused before it costs anything."""

import gc
import os
import subprocess
import sys
import threading
import wave
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from diffsynth.utils.data import VideoData
from PIL import Image

from daemon.errors import ErrorCode, PermanentJobError
from daemon.media import stage_audio, stage_video
from daemon.sections import InputsConfig

FIELD = "inputs.input_video"


def ffmpeg(*arguments: str) -> None:
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *arguments], check=True)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven frames of 90x70 with sound as MP4 and WebM, and two seconds of sound as WAV and MP3."""
    folder = tmp_path_factory.mktemp("media")
    source = ["-f", "lavfi", "-i", "testsrc2=size=90x70:rate=8", "-f", "lavfi", "-i", "sine=440:sample_rate=44100"]
    ffmpeg(*source, "-frames:v", "7", "-shortest", "-pix_fmt", "yuv420p", str(folder / "seven.mp4"))
    ffmpeg(*source, "-frames:v", "7", "-shortest", "-c:v", "libvpx-vp9", "-c:a", "libopus", str(folder / "seven.webm"))
    for name in ("sound.wav", "sound.mp3"):
        ffmpeg("-f", "lavfi", "-i", "sine=440:sample_rate=44100:duration=2", str(folder / name))
    return folder


def settings(media: Path, **changed: Any) -> InputsConfig:
    return InputsConfig(**{"schemes": ("file", "http"), "roots": (media,)} | changed)


def stage(media: Path, tmp_path: Path, name: str, **changed: Any) -> "np.ndarray[Any, Any]":
    target = tmp_path / "work" / "input_video.npy"
    shape = {"width": 64, "height": 48, "num_frames": 5, "may_be_shorter": False}
    shape |= {key: changed.pop(key) for key in list(changed) if key in shape}
    stage_video((media / name).as_uri(), target, settings(media, **changed), path=FIELD, **shape)  # type: ignore[arg-type]
    return np.asarray(np.load(target))


def refusal(media: Path, tmp_path: Path, name: str, **changed: Any) -> str:
    with pytest.raises(PermanentJobError) as caught:
        stage(media, tmp_path, name, **changed)
    assert (caught.value.code, caught.value.path) == (ErrorCode.INPUT_REJECTED, FIELD)
    assert list((tmp_path / "work").glob("*")) == [], "nothing is left of a refused input"
    return caught.value.message


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # imageio's
@pytest.mark.parametrize(("name", "size"), [("seven.mp4", (64, 48)), ("seven.mp4", (48, 96)), ("seven.webm", (90, 70))])
def test_frames_are_those_of_diffsynths_own_reader(
    media: Path, tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    """The first frames, cropped and resized to the byte as `VideoData` makes them, wider, taller and as they are."""
    width, height = size
    staged = stage(media, tmp_path, name, width=width, height=height)
    video = VideoData(str(media / name), height=height, width=width)
    assert staged.dtype == np.uint8
    assert np.array_equal(staged, np.stack([np.asarray(video[index]) for index in range(5)]))
    assert len({frame.tobytes() for frame in staged}) == 5
    del video
    gc.collect()  # its reader leaves open pipes: here, not in another test


def test_a_video_with_too_few_frames_is_refused_but_where_it_may_be_shorter(media: Path, tmp_path: Path) -> None:
    """Nine frames cannot come of seven; a pose video may be as short as it is."""
    assert "has 7 frames; 9 are needed" in refusal(media, tmp_path, "seven.mp4", num_frames=9)
    assert len(stage(media, tmp_path, "seven.mp4", num_frames=9, may_be_shorter=True)) == 7
    whole = stage(media, tmp_path, "seven.mp4", num_frames=7)
    shorter = stage(media, tmp_path, "seven.mp4", num_frames=100_000, may_be_shorter=True)
    assert np.array_equal(shorter, whole)
    assert (tmp_path / "work" / "input_video.npy").stat().st_size < 2 * whole.nbytes, "no room for what did not come"


_STAGE_THERE = """
import sys
from pathlib import Path
from daemon.media import stage_audio, stage_video
from daemon.sections import InputsConfig

folder, uri = sys.argv[1:]
target = Path(folder, "work", "input.npy")
config = InputsConfig(schemes=("file",), roots=(Path("/"),))
try:
    if uri.endswith(".wav"):
        stage_audio(uri, target, config, path="inputs.input_audio")
    else:
        stage_video(uri, target, config, path="inputs.input_video", width=640, height=480, num_frames=5)
except OSError as error:
    print(type(error).__name__, error.strerror)
print(*target.parent.iterdir())
"""


@pytest.mark.parametrize("name", ["seven.mp4", "long.wav"])
def test_row_22_a_full_disk_is_an_error_and_leaves_nothing(media: Path, tmp_path: Path, name: str) -> None:
    """Frames or samples that the work disk has no room for: OSError, which is tried again, and not SIGBUS."""
    if name == "long.wav":
        ffmpeg("-f", "lavfi", "-i", "sine=440:sample_rate=8000:duration=30", "-ar", "8000", str(media / name))
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", "--mount", *user, "sh", "-euc", 'mount -t tmpfs -o size=1m tmpfs "$1"; shift; exec "$@"']
    command += ["sh", str(tmp_path), sys.executable, "-c", _STAGE_THERE, str(tmp_path), (media / name).as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "OSError No space left on device\n\n", "")


def test_row_21_a_video_over_the_limits_is_refused(media: Path, tmp_path: Path) -> None:
    """Bytes before anything is decoded, pixels before a frame is, and time while it is."""
    assert "more than 1000 bytes" in refusal(media, tmp_path, "seven.mp4", max_video_bytes=1000)
    refusal(media, tmp_path, "seven.mp4", max_video_pixels=90 * 70 - 1)
    assert len(stage(media, tmp_path, "seven.mp4", max_video_pixels=128 * 128)) == 5  # the codec pads
    assert "not decoded within" in refusal(media, tmp_path, "seven.mp4", decode_seconds=0.001)


def write_not_a_video(folder: Path, name: str) -> None:
    match name:
        case "text.mp4":
            (folder / name).write_text("<!DOCTYPE html><html><body>404</body></html>")
        case "empty.mp4":
            (folder / name).write_bytes(b"")
        case "image.mp4":
            Image.new("RGB", (64, 48)).save(folder / name, "PNG")
        case "truncated.mp4":
            whole = (folder / "seven.mp4").read_bytes()
            (folder / name).write_bytes(whole[: len(whole) // 2])
        case "random.webm":
            (folder / name).write_bytes((folder / "seven.webm").read_bytes()[:200] + os.urandom(20_000))
        case "sound-only.mp4":
            ffmpeg("-f", "lavfi", "-i", "sine=440:duration=1", "-f", "mp4", str(folder / name))


@pytest.mark.parametrize(
    "name", ["text.mp4", "empty.mp4", "image.mp4", "truncated.mp4", "random.webm", "sound-only.mp4"]
)
def test_row_21_what_is_no_video_is_refused(media: Path, tmp_path: Path, name: str) -> None:
    """Whatever its name says."""
    write_not_a_video(media, name)
    refusal(media, tmp_path, name)


@pytest.fixture
def cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the real ffmpeg's output end after so many bytes, and ffmpeg go on until it is killed."""

    def cut(after_bytes: int) -> None:
        program = tmp_path / "ffmpeg"
        program.write_text(
            f'#!/bin/sh\n{imageio_ffmpeg.get_ffmpeg_exe()} "$@" 2>/dev/null | head -c {after_bytes}\nexec sleep 60\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))

    return cut


@pytest.mark.parametrize("after_bytes", [0, 1, 3, 5, 8, 9, 12, 13, 14])
def test_row_21_a_frame_that_is_cut_anywhere_is_refused(
    media: Path, tmp_path: Path, cut_short: Callable[[int], None], after_bytes: int
) -> None:
    """ffmpeg is killed while it writes a frame's header (13 bytes here): the job's fault, not rank 0's end."""
    cut_short(after_bytes)
    assert "not decoded within 1.0 s" in refusal(media, tmp_path, "seven.mp4", decode_seconds=1.0)


def test_row_21_a_sound_that_is_cut_anywhere_is_refused(
    media: Path, tmp_path: Path, cut_short: Callable[[int], None]
) -> None:
    """ffmpeg is killed within a sample."""
    cut_short(4 * 1000 + 3)
    target = tmp_path / "work" / "audio.npy"
    config = settings(media, decode_seconds=1.0)
    with pytest.raises(PermanentJobError, match="not decoded within"):
        stage_audio((media / "sound.wav").as_uri(), target, config, path="inputs.input_audio")
    assert not target.exists()


def test_row_29_a_playlist_leads_ffmpeg_nowhere(media: Path, tmp_path: Path) -> None:
    """HLS, a concat script and an SDP would make ffmpeg open other files or connect: none is even recognised."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/secret.ts"
        local = (media / "seven.mp4").as_posix()
        scripts = {
            "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{url}\n#EXT-X-ENDLIST\n",
            "hls-file.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{local}\n#EXT-X-ENDLIST\n",
            "concat.mp4": f"ffconcat version 1.0\nfile '{local}'\n",
            "dash.mp4": f"<?xml version='1.0'?><MPD><Period><BaseURL>{url}</BaseURL></Period></MPD>",
        }
        for name, text in scripts.items():
            (media / name).write_text(text)
            refusal(media, tmp_path, name)
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []


@pytest.mark.parametrize("name", ["sound.wav", "sound.mp3", "seven.mp4"])
def test_sound_becomes_one_channel_at_16_khz(media: Path, tmp_path: Path, name: str) -> None:
    """The tone that went in is the tone that is staged; a video's sound will do."""
    target = tmp_path / "audio.npy"
    stage_audio((media / name).as_uri(), target, settings(media), path="inputs.input_audio")
    samples = np.load(target)
    seconds = 7 / 8 if name == "seven.mp4" else 2
    assert samples.dtype == np.float32
    assert abs(len(samples) / 16_000 - seconds) < 0.2  # codecs pad, and -shortest cuts at a packet
    loudest = np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples)
    assert abs(loudest - 440) < 2


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("sound.wav", {"max_audio_seconds": 1.5}, "longer than 1.5 s"),
        ("sound.wav", {"max_audio_bytes": 1000}, "more than 1000 bytes"),
        ("silent.mp4", {}, "not a readable audio file"),
        ("nothing.wav", {}, "holds no sound"),
    ],
)
def test_what_is_no_sound_or_too_long_is_refused(
    media: Path, tmp_path: Path, name: str, changed: dict[str, Any], says: str
) -> None:
    """A sound is taken whole or not at all."""
    if name == "silent.mp4":
        ffmpeg("-i", str(media / "seven.mp4"), "-an", "-c:v", "copy", str(media / name))
    elif name == "nothing.wav":
        with wave.open(str(media / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
    target = tmp_path / "audio.npy"
    with pytest.raises(PermanentJobError) as caught:
        stage_audio((media / name).as_uri(), target, settings(media, **changed), path="inputs.input_audio")
    assert caught.value.code is ErrorCode.INPUT_REJECTED
    assert says in caught.value.message
    assert not target.exists()
