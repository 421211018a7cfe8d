"""Encoding with the real ffmpeg: what goes in comes out, and a failure is never taken for a video."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import psutil
import pytest

from daemon.errors import ErrorCode, TransientJobError
from daemon.video import encode_video

WIDTH, HEIGHT = 96, 64


def gradient(count: int) -> Iterator[Any]:
    """Smooth frames that differ, which H.264 keeps almost as they are."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    for index in range(count):
        yield np.stack([rows * 3, columns * 2, np.full_like(rows, index * 20)], axis=-1).astype(np.uint8)


def encode(frames: Any, path: Path, *, width: int = WIDTH, height: int = HEIGHT) -> int:
    return encode_video(frames, path, width=width, height=height, fps=8, crf=18)


@pytest.fixture(autouse=True)
def _no_ffmpeg_is_left() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children()}
    yield
    left = [child for child in psutil.Process().children() if child.pid not in before]
    assert left == []


# imageio_ffmpeg's reader leaves its pipes to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_video_decodes_to_the_frames_that_went_in(tmp_path: Path) -> None:
    """Count, size, rate and, nearly, the colours survive encoding."""
    path = tmp_path / "video.part"
    assert encode(gradient(9), path) == 9
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert meta["size"] == (WIDTH, HEIGHT)
    assert meta["fps"] == 8
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    decoded = [np.frombuffer(raw, np.uint8).reshape(HEIGHT, WIDTH, 3) for raw in reader]
    assert len(decoded) == 9
    for got, frame in zip(decoded, gradient(9), strict=True):
        assert np.abs(got.astype(int) - frame).mean() < 4


def test_a_video_starts_with_its_index(tmp_path: Path) -> None:
    """moov stands before mdat, so that a player can start before it has the whole file."""
    path = tmp_path / "video.part"
    encode(gradient(5), path)
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("count", [1, 200])
def test_a_folder_that_is_not_there_is_a_transient_error(tmp_path: Path, count: int) -> None:
    """Few frames fit into the pipe before ffmpeg has failed, and many do not; both are an error."""
    with pytest.raises(TransientJobError, match="No such file or directory") as caught:
        encode(gradient(count), tmp_path / "missing" / "video.part")
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_a_transient_error() -> None:
    """When the last bytes do not fit, ffmpeg's exit status says so, and we listen."""
    with pytest.raises(TransientJobError, match="No space left on device"):
        encode(gradient(5), Path("/dev/full"))


def test_what_the_encoder_cannot_do_is_an_error(tmp_path: Path) -> None:
    """4:2:0 needs even sizes; an empty file is not passed on as a video."""
    with pytest.raises(TransientJobError, match="not divisible by 2"):
        encode([np.zeros((31, 63, 3), np.uint8)], tmp_path / "video.part", width=63, height=31)


def test_a_failure_in_the_frames_is_passed_on_and_ends_ffmpeg(tmp_path: Path) -> None:
    """What the decoding raises comes out as it is, with no ffmpeg left running."""

    def broken() -> Iterator[Any]:
        yield from gradient(2)
        raise RuntimeError("decoding")

    with pytest.raises(RuntimeError, match="decoding"):
        encode(broken(), tmp_path / "video.part")
