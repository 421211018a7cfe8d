"""Encoding: frames to an H.264 file through ffmpeg, streamed frame by frame.

Owns the encoder's settings. Leaves out where the file goes (`daemon.storage`) and quantising (`parallel.engine`).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from daemon.errors import ErrorCode, TransientJobError

CODEC = "h264"


def encode_video(frames: Iterable[Any], path: Path, *, width: int, height: int, fps: int, crf: int) -> int:
    """Writes uint8 RGB frames, each (height, width, 3), to an .mp4 that any player opens. Returns their number.

    Raises TransientJobError(storage_unavailable) when ffmpeg cannot write the file.
    """
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        pix_fmt_in="rgb24",
        pix_fmt_out="yuv420p",
        fps=fps,
        codec="libx264",
        quality=None,
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-crf", str(crf), "-preset", "medium", "-movflags", "+faststart", "-f", "mp4"],
    )
    count = 0
    try:
        writer.send(None)
        for frame in frames:
            writer.send(frame.tobytes())
            count += 1
        writer.close()
    except OSError as error:
        raise TransientJobError(
            ErrorCode.STORAGE_UNAVAILABLE, f"ffmpeg could not write {path.name}: {error}"
        ) from error
    return count
