"""Encoding: frames to an H.264 file through ffmpeg, streamed frame by frame.

Owns the encoder's settings. Leaves out where the file goes (`daemon.storage`) and quantising
(`parallel.engine`).
"""

import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import imageio_ffmpeg

from daemon.errors import ErrorCode, TransientJobError

CODEC = "h264"


def encode_video(frames: Iterable[Any], path: Path, *, width: int, height: int, fps: int, crf: int) -> int:
    """Writes uint8 RGB frames, each (height, width, 3), to an .mp4 for any player. Returns their number.

    Raises TransientJobError(storage_unavailable) when ffmpeg cannot write the file.
    """
    # Not imageio_ffmpeg.write_frames: it drops ffmpeg's exit status, so a full disk looks like a success.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    command += ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(crf), "-preset", "medium"]
    command += ["-movflags", "+faststart", "-f", "mp4", str(path)]
    try:
        with tempfile.TemporaryFile() as errors:
            # A group of its own: Ctrl-C in a terminal drains the daemon and must not end its encoder.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, process_group=0
            )
            try:
                assert process.stdin is not None
                count = _feed(process.stdin, frames)
                status = process.wait()
            finally:
                process.kill()  # nothing to do where it has ended
                process.wait()
            if status == 0 and count is not None:
                return count
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines()
    except OSError as error:
        raise _unavailable(path, str(error)) from error
    raise _unavailable(path, lines[0] if lines else f"exit status {status}")


def _feed(stdin: IO[bytes], frames: Iterable[Any]) -> int | None:
    """Writes the frames. Returns their number, or None when ffmpeg ended before it had them all."""
    count = 0
    try:
        with stdin:
            for frame in frames:
                stdin.write(frame.tobytes())
                count += 1
    except BrokenPipeError:
        return None
    return count


def _unavailable(path: Path, reason: str) -> TransientJobError:
    return TransientJobError(ErrorCode.STORAGE_UNAVAILABLE, f"ffmpeg could not write {path.name}: {reason[:300]}")
