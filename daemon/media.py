"""A job's videos and audio: fetched, decoded by ffmpeg in a bounded process, and staged for rank 0.

Owns the real check of what a file is (a short list of containers and codecs, none of which can lead ffmpeg to
another file), the limits of pixels, frames, memory and time, and the form of the staged files, which
`parallel.inputs` reads: .npy arrays, so that hostile bytes are decoded here and nowhere else. Leaves out
fetching (`daemon.inputs`).
"""

import contextlib
import resource
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import imageio_ffmpeg
import numpy as np
from PIL import Image

from daemon.errors import ErrorCode, PermanentJobError
from daemon.inputs import fetch_input
from daemon.sections import InputsConfig

AUDIO_SAMPLE_RATE = 16_000
# By ffmpeg's names. No playlist, concatenation or image sequence: those name other files.
_VIDEO_FORMATS = "mov,mp4,matroska,webm,avi"
_AUDIO_FORMATS = "wav,mp3,flac,ogg,aac,mov,mp4,matroska,webm"
_CODECS = (
    "h264,hevc,vp8,vp9,libdav1d,av1,mpeg4,mjpeg,prores,ffv1,png,rawvideo,"
    "aac,mp3,mp3float,flac,vorbis,opus,pcm_u8,pcm_s16le,pcm_s24le,pcm_s32le,pcm_f32le"
)
_DECODER_MEMORY_BYTES = 4 * 1024**3  # of address space; a 4K frame with its references needs about 1 GiB


def stage_video(
    uri: str,
    target: Path,
    config: InputsConfig,
    *,
    path: str,
    width: int,
    height: int,
    num_frames: int,
    may_be_shorter: bool = False,
) -> None:
    """Fetches a video and writes its first `num_frames` frames to `target`, a .npy file of uint8 RGB.

    The array is (num_frames, height, width, 3): frames one by one as they are decoded, without regard to their
    times, cropped in the middle to the shape asked for and resized. `path` is the field that names the video,
    for errors. Raises what `stage_image` raises, PermanentJobError(input_rejected) also for what is no video,
    has too few frames (unless `may_be_shorter`) or too large ones, or takes too long to decode; OSError when the
    disk is full.
    """
    data = fetch_input(uri, config.model_copy(update={"max_bytes": config.max_video_bytes}), path)
    command = ["-max_pixels", str(config.max_video_pixels), "-format_whitelist", _VIDEO_FORMATS, "-i", "fd:"]
    command += ["-map", "0:v:0", "-frames:v", str(num_frames), "-fps_mode", "passthrough"]
    command += ["-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe"]
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    # Written, and not stored into a map of the file: there a full disk would be SIGBUS, and the end of rank 0.
    with _removed_on_failure(target), target.open("wb") as file:
        _write_header(file, np.dtype(np.uint8), (num_frames, height, width, 3))
        with _decoding(data, command, config, target.parent, path, what="video") as output:
            while count < num_frames and (frame := _read_frame(output)) is not None:
                file.write(_crop_and_resize(frame, width=width, height=height).data)
                count += 1
        if count == 0 or (count < num_frames and not may_be_shorter):
            raise _rejected(f"has {count} frames; {num_frames} are needed (parameters.num_frames)", path)
        if count < num_frames:
            file.seek(0)
            _write_header(file, np.dtype(np.uint8), (count, height, width, 3))


def stage_audio(uri: str, target: Path, config: InputsConfig, *, path: str) -> None:
    """Fetches a sound and writes it to `target`, a .npy file of float32: one channel, 16,000 samples a second.

    Raises as `stage_video` does; a sound longer than `inputs.max_audio_seconds` is rejected, not cut.
    """
    data = fetch_input(uri, config.model_copy(update={"max_bytes": config.max_audio_bytes}), path)
    limit = int(config.max_audio_seconds * AUDIO_SAMPLE_RATE)
    command = ["-format_whitelist", _AUDIO_FORMATS, "-i", "fd:", "-map", "0:a:0", "-ac", "1"]
    command += ["-ar", str(AUDIO_SAMPLE_RATE), "-t", str(config.max_audio_seconds + 1), "-f", "f32le"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with _removed_on_failure(target):
        with _decoding(data, command, config, target.parent, path, what="audio file") as output:
            decoded = output.read()
        samples = np.frombuffer(decoded, dtype="<f4")  # here, as what was cut short may end within a sample
        if samples.size > limit:
            raise _rejected(f"longer than {config.max_audio_seconds} s (inputs.max_audio_seconds)", path)
        if not samples.size or not np.isfinite(samples).all():
            raise _rejected("holds no sound", path)
        with target.open("wb") as file:
            _write_header(file, samples.dtype, samples.shape)
            file.write(samples.data)


@contextlib.contextmanager
def _decoding(
    data: bytes, arguments: list[str], config: InputsConfig, folder: Path, path: str, *, what: str
) -> Iterator[IO[bytes]]:
    """ffmpeg over `data`, as a stream of what it decodes; at the end its verdict becomes an error.

    The process may open nothing: it has the data on a descriptor (`fd:`, which can seek, as MP4 needs) and that
    protocol alone. Memory and time are bounded from here.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-threads", "2"]
    command += ["-protocol_whitelist", "fd", "-codec_whitelist", _CODECS, *arguments, "pipe:1"]
    seconds = config.decode_seconds
    with (
        tempfile.TemporaryFile(dir=folder) as source,
        tempfile.TemporaryFile() as errors,
    ):
        source.write(data)
        source.seek(0)
        # A group of its own: Ctrl-C in a terminal drains the daemon and must not fail its job.
        process = subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=errors, process_group=0)
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            # Set from outside: a function between fork and exec is not safe in a process with threads.
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_AS, (_DECODER_MEMORY_BYTES, _DECODER_MEMORY_BYTES))
                cpu = int(seconds * 2) + 1
                resource.prlimit(process.pid, resource.RLIMIT_CPU, (cpu, cpu))
            assert process.stdout is not None
            with process.stdout:
                yield process.stdout
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()  # nothing to do where it has ended
            process.wait()
        if late.is_set():
            raise _rejected(f"not decoded within {seconds} s (inputs.decode_seconds)", path)
        if status != 0:
            errors.seek(0)
            lines = errors.read(10_000).decode(errors="replace").splitlines()
            reason = lines[-1] if lines else f"ffmpeg ended with status {status}"
            raise _rejected(f"not a readable {what}: {reason}"[:300], path)


def _write_header(file: IO[bytes], dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> None:
    """The start of a .npy file. It is as long for fewer frames: numpy leaves room for an array that grows."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _read_frame(output: IO[bytes]) -> "np.ndarray[Any, np.dtype[np.uint8]] | None":
    """The next frame of a stream of PPM images (P6, width and height, 255), or None at its end.

    A stream that is cut anywhere ends there: why it was is for `_decoding` to say.
    """
    magic, size, depth = output.readline(16), output.readline(32), output.readline(16)
    if (magic, depth) != (b"P6\n", b"255\n"):
        return None
    width, height = (int(number) for number in size.split())
    pixels = output.read(width * height * 3)
    if len(pixels) < width * height * 3:
        return None
    return np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3)


def _crop_and_resize(
    frame: "np.ndarray[Any, np.dtype[np.uint8]]", *, width: int, height: int
) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """What DiffSynth's `VideoData(path, height, width)` makes of a frame: the middle, by Pillow's bicubic filter."""
    has_height, has_width, _ = frame.shape
    if (has_height, has_width) == (height, width):
        return frame
    if has_height / has_width < height / width:
        cropped = int(has_height / height * width)
        left = (has_width - cropped) // 2
        frame = frame[:, left : left + cropped]
    else:
        cropped = int(has_width / width * height)
        top = (has_height - cropped) // 2
        frame = frame[top : top + cropped]
    if 0 in frame.shape:  # a video of a few pixels, of quite another shape
        frame = np.zeros((1, 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height)))


@contextlib.contextmanager
def _removed_on_failure(target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _rejected(message: str, path: str) -> PermanentJobError:
    return PermanentJobError(ErrorCode.INPUT_REJECTED, message, path=path)
