"""`reeld doctor` on the machine: disk, ffmpeg, GPUs, shared memory, the clock and, when asked, what torch finds.

Each check really does the thing (writes, runs, asks the kernel). Leaves out torch itself: `parallel.inventory` is
asked in a process of its own.
"""

import ctypes
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from daemon.config import Config
from daemon.writable import NoHardLinksError, write_into
from ops.ages import size_text
from ops.finding import Finding, output_of

_FREE_DISK_BYTES = 1 << 30
_SHARED_BYTES = 1 << 30
_BUSY_BYTES = 1 << 30
_TIME_ERROR = 5  # sys/timex.h: the kernel's clock is not synchronised
# Of systemd/reeld@.service.
_SERVICE_USER = "reeld"
_GPU_FIELDS = ("name", "memory.total", "memory.used", "driver_version", "ecc.errors.uncorrected.volatile.total")


def examine_machine(config: Config | None, *, with_torch: bool) -> Iterator[Finding]:
    yield _ffmpeg()
    yield from _nvidia(config)
    if config is not None and config.device != "cpu" and config.nproc_per_node != 1:
        yield _shared_memory()
    yield clock()
    if with_torch:
        yield from _torch(config)


def examine_directory(name: str, directory: Path, *, hard_links: bool = False, user: str = _SERVICE_USER) -> Finding:
    """Writes a file where the worker will. Root, who may write anywhere, asks for the service's user as well."""
    try:
        place = write_into(directory, hard_links=hard_links)
    except NoHardLinksError as error:
        return Finding(name, "fail", f"{directory}: {error.strerror}", "move it to a file system with hard links")
    except OSError as error:
        fix = f"create it for the worker's user: sudo install -d -o USER {directory}"
        return Finding(name, "fail", f"{directory}: not writable: {error.strerror}", fix)
    if os.geteuid() == 0 and not _may_write(user, place):
        text = f"{directory}: the service's user, {user}, cannot write to {place}"
        fix = f"sudo chown {user}: {place}" if place == directory else f"sudo install -d -o {user} {directory}"
        return Finding(name, "fail", text, fix)
    free = shutil.disk_usage(place).free
    text = f"{directory}: {size_text(free)} free" + ("" if place == directory else " (will be created)")
    if free < _FREE_DISK_BYTES:
        return Finding(name, "warn", text, "make room, or move the directory")
    return Finding(name, "ok", text)


def _may_write(user: str, place: Path) -> bool:
    """What the kernel says to a user. One that is not there, because nothing is installed, may."""
    try:
        group = pwd.getpwnam(user).pw_gid
    except KeyError:
        return True
    asked = ["test", "-w", str(place), "-a", "-x", str(place)]
    groups = os.getgrouplist(user, group)
    return subprocess.run(asked, user=user, group=group, extra_groups=groups, check=False).returncode == 0


class _Timex(ctypes.Structure):
    """struct timex of sys/timex.h, as 64-bit Linux has it."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        *((name, ctypes.c_long) for name in ("offset", "freq", "maxerror", "esterror")),
        ("status", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("constant", "precision", "tolerance", "seconds", "microseconds")),
        *((name, ctypes.c_long) for name in ("tick", "ppsfreq", "jitter")),
        ("shift", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("stabil", "jitcnt", "calcnt", "errcnt", "stbcnt")),
        ("tai", ctypes.c_int),
        ("reserved", ctypes.c_int * 11),
    )


def clock() -> Finding:
    """Asks the kernel whether something (NTP, PTP, the hypervisor) keeps its clock right.

    The broker's clock cannot be asked for over AMQP; `reeld top` shows a worker whose clock is off.
    """
    found = _Timex()
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.byref(found))  # modes is 0: reads only
    if state < 0:
        return Finding("clock", "warn", "the kernel does not say whether its clock is synchronised", "")
    if state == _TIME_ERROR:
        fix = "`sudo timedatectl set-ntp true`, or install chrony; in a container this is the host's affair"
        return Finding("clock", "warn", "the kernel's clock is not synchronised: expirations and log times drift", fix)
    return Finding("clock", "ok", f"synchronised, at most {found.maxerror / 1000:.0f} ms off")


def _ffmpeg() -> Finding:
    import imageio_ffmpeg  # here, because it imports numpy

    fix = "install imageio-ffmpeg again, or set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264"
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        version = output_of([program, "-version"]).splitlines()[0]
        encoders = output_of([program, "-hide_banner", "-encoders"])
    except (RuntimeError, OSError, subprocess.SubprocessError, IndexError) as error:
        return Finding("ffmpeg", "fail", str(error), fix)
    if "libx264" not in encoders:
        return Finding("ffmpeg", "fail", f"{program} has no libx264 encoder", fix)
    return Finding("ffmpeg", "ok", f"{version.split(' Copyright')[0]} ({program})")


def _nvidia(config: Config | None) -> Iterator[Finding]:
    wanted = config is not None and config.device == "cuda"
    program = shutil.which("nvidia-smi")
    if program is None:
        yield _no_gpu(config, "GPU", "no nvidia-smi", "install the NVIDIA driver")
        return
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    try:
        listed = output_of([program, query, "--format=csv,noheader,nounits"])
    except (OSError, subprocess.SubprocessError) as error:
        yield _no_gpu(config, "GPU", f"nvidia-smi: {error}", "mend the NVIDIA driver")
        return
    gpus = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.strip()]
    if not gpus:
        yield _no_gpu(config, "GPU", "nvidia-smi finds no GPU", "mend the NVIDIA driver")
    yield from (_gpu(index, cells) for index, cells in enumerate(gpus))
    ranks = config.nproc_per_node if config is not None else "auto"
    if wanted and isinstance(ranks, int) and ranks > len(gpus):
        text = f"nproc_per_node is {ranks}, and there are {len(gpus)} GPUs"
        yield Finding("GPU", "fail", text, "lower nproc_per_node, or set it to 'auto'")


def _no_gpu(config: Config | None, name: str, text: str, fix: str) -> Finding:
    match config.device if config is not None else None:
        case "cuda":
            return Finding(name, "fail", text, f"{fix}, or set device = 'cpu'")
        case "auto":
            text += ": device is 'auto', so the worker takes its jobs onto the CPU"
            return Finding(name, "warn", text, f"{fix}, and set device = 'cuda'; or 'cpu', if that is meant")
        case "cpu":
            return Finding(name, "ok", f"{text}: the worker runs on the CPU")
        case None:
            return Finding(name, "warn", text, fix)


def _gpu(index: int, cells: list[str]) -> Finding:
    name, total, used, driver, errors = (cells + [""] * len(_GPU_FIELDS))[: len(_GPU_FIELDS)]
    text = f"{index}: {name}, {used} of {total} MiB used, driver {driver}"
    if errors.isdigit() and int(errors) > 0:
        fix = "`nvidia-smi -q -d ECC`; reset the GPU, and replace it if they come again"
        return Finding("GPU", "warn", f"{text}; {errors} uncorrected memory errors", fix)
    if used.isdigit() and int(used) << 20 > _BUSY_BYTES:
        fix = "`nvidia-smi` says whose processes; a running worker's own are as they should be"
        return Finding("GPU", "warn", f"{text}: somebody uses it", fix)
    return Finding("GPU", "ok", text)


def _shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "fail", "there is no /dev/shm, which NCCL needs between ranks", "mount a tmpfs")
    total = shutil.disk_usage(place).total
    text = f"/dev/shm holds {size_text(total)}"
    if total < _SHARED_BYTES:
        return Finding(
            "shared memory", "warn", text, "NCCL may need more: docker's --shm-size=1g, or remount it larger"
        )
    return Finding("shared memory", "ok", text)


def _torch(config: Config | None) -> Iterator[Finding]:
    try:
        found = json.loads(
            output_of([sys.executable, "-m", "parallel.inventory"], timeout_seconds=120).splitlines()[-1]
        )
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        yield Finding("torch", "fail", f"torch does not start: {error}", "install reeld again: `make install`")
        return
    gpus = found["gpus"]
    names = ", ".join(f"{gpu['name']} (sm {gpu['capability']})" for gpu in gpus) or "no GPU"
    text = f"torch {found['torch']}, CUDA {found['cuda']}, cuDNN {found['cudnn']}: {names}"
    wanted = config is not None and config.device == "cuda"
    if gpus:
        yield Finding("torch", "ok", text)
    else:
        fix = "install a driver that fits torch's CUDA, see that CUDA_VISIBLE_DEVICES is not empty"
        yield _no_gpu(config, "torch", text, fix)
    yield _nccl(found, several=wanted and config is not None and config.nproc_per_node != 1)
    yield _kernels(found)


def _nccl(found: dict[str, object], *, several: bool) -> Finding:
    if found["nccl"] is None:
        state, fix = ("fail", "install a torch with CUDA") if several else ("ok", "")
        return Finding(
            "NCCL", "fail" if state == "fail" else "ok", "torch has none: several GPUs cannot share a job", fix
        )
    apart = [
        index
        for index, gpu in enumerate(_list(found["gpus"]))
        if gpu["reaches"] == [] and len(_list(found["gpus"])) > 1
    ]
    if apart:
        text = f"NCCL {found['nccl']}; GPUs {apart} reach no other one directly"
        return Finding("NCCL", "warn", text, "exchanges go through the host's memory: see `nvidia-smi topo -m`")
    return Finding("NCCL", "ok", f"NCCL {found['nccl']}")


def _list(value: object) -> list[dict[str, object]]:
    return value if isinstance(value, list) else []


def _kernels(found: dict[str, object]) -> Finding:
    kernels = found["kernels"]
    assert isinstance(kernels, dict)
    best = next((name for name, refusal in kernels.items() if refusal is None), None)
    refused = "; ".join(f"{name} does not run: {refusal}" for name, refusal in kernels.items() if refusal is not None)
    if best is None:
        return Finding("attention", "fail", refused, "use a torch that fits the GPU, or dtype = 'float32'")
    return Finding("attention", "ok", f"{best} runs in bfloat16" + (f"; {refused}" if refused else ""))
