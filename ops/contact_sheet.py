"""A contact sheet: the frames of a video file, decoded back and tiled into one PNG.

Owns reading a video as a player would and laying out its frames. Leaves out encoding (the daemon).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
from PIL import Image

_GAP = 4
_BACKGROUND = (24, 24, 24)


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """What ffmpeg finds in a video file. `frames` are RGB."""

    width: int
    height: int
    fps: float
    codec: str
    frames: tuple[Image.Image, ...]


def decode(path: Path) -> DecodedVideo:
    """Decodes every frame. Raises OSError when it is no video."""
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    try:
        meta = next(reader)
        size = meta["source_size"]
        frames = tuple(Image.frombytes("RGB", size, bytes(frame)) for frame in reader)
    finally:
        reader.close()
    return DecodedVideo(width=size[0], height=size[1], fps=float(meta["fps"]), codec=str(meta["codec"]), frames=frames)


def write_contact_sheet(video: DecodedVideo, path: Path) -> None:
    """Writes the frames in reading order, as near to a 16:9 sheet as they go."""
    count = len(video.frames)
    columns = max(1, min(count, round(math.sqrt(count * 16 / 9 * video.height / video.width))))
    rows = math.ceil(count / columns)
    step_x, step_y = video.width + _GAP, video.height + _GAP
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), _BACKGROUND)
    for index, frame in enumerate(video.frames):
        row, column = divmod(index, columns)
        sheet.paste(frame, (_GAP + column * step_x, _GAP + row * step_y))
    sheet.save(path)
