"""How long a model takes to load from a cold disk, beside reading its files once.

`make bench-loading ARGS="--ranks 1 2 --runs 3"`, as root, because the page cache is dropped before each reading. The
files are the 1.3B's DiT (2.8 GB of random numbers, bfloat16) and the tiny model's other parts, made on the spot, or
those of `--model`, with its `--profile`. Goes to GPUs where there are some.

The floor is the faster of one thread and four that read the files and do nothing with them. Loading is `load_model`
between two barriers: the ranks' start and imports are not in it. Prints Markdown, and writes it and JSON into `--out`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_BLOCK = 16 * 1024 * 1024
_PROFILE = "bench-loading"


def main() -> None:
    options = _options()
    if options.folder is not None:
        _load(options.profile, Path(options.folder))
        return
    if os.geteuid() != 0:
        sys.exit("benchmarks.loading: must be root, to drop the page cache before each reading")
    with tempfile.TemporaryDirectory(dir=options.disk) as scratch:
        profile, folder = (options.profile, options.model) if options.model else _write_model(Path(scratch))
        files = sorted(folder.rglob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        rows: list[dict[str, Any]] = []
        for run in range(options.runs):
            floor = min(_read(files, threads=1), _read(files, threads=4))
            for ranks in options.ranks:
                seconds, read = _measure(profile, folder, ranks)
                rows.append({"run": run, "ranks": ranks, "floor": floor, "seconds": seconds, "read_bytes": read})
                print(json.dumps(rows[-1]), flush=True)
    lines = [
        "| ranks | reading once, s | GB/s | loading, s | times the floor | bytes read by all ranks / size |",
        "|---" * 6 + "|",
    ]
    for ranks in options.ranks:
        own = [row for row in rows if row["ranks"] == ranks]
        floor = statistics.median(row["floor"] for row in own)
        seconds = statistics.median(row["seconds"] for row in own)
        ratio = statistics.median(row["seconds"] / row["floor"] for row in own)
        share = max(row["read_bytes"] for row in own) / size
        lines.append(
            f"| {ranks} | {floor:.2f} | {size / floor / 1e9:.2f} | {seconds:.2f} | {ratio:.2f} | {share:.3f} |"
        )
    print("\n".join(lines))
    if options.out is not None:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "loading.json").write_text(json.dumps({"bytes": size, "rows": rows}, indent=1))
        (out / "loading.md").write_text("\n".join(lines) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--disk", help="folder on the disk to measure; by default the temporary one")
    parser.add_argument("--model", type=Path, help="a whole model's folder, instead of one that is made")
    parser.add_argument("--profile", help="its profile")
    parser.add_argument("--out", help="folder for loading.json and loading.md")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # a rank of its own
    return parser.parse_args()


def _write_model(scratch: Path) -> tuple[str, Path]:
    """A profile and its folder: the tiny model with the 1.3B's DiT."""
    import torch
    from safetensors.torch import save_file

    from parallel.parts import layout_of
    from parallel.profile import load_profile
    from parallel.tiny import write_tiny_model

    write_tiny_model(scratch)
    folder = scratch / _PROFILE
    shutil.move(scratch / "tiny-t2v", folder)
    (part,) = (part for part in load_profile("wan2.1-t2v-1.3b").parts if part.role == "dit")
    tiny = load_profile("tiny-t2v")
    (replaced,) = (each for each in tiny.parts if each.role == "dit")
    tensors = {name: torch.rand(shape, dtype=torch.bfloat16) for name, shape in layout_of(part).items()}
    save_file(tensors, folder / replaced.files[0])
    text = Path("parallel/profiles/tiny-t2v.toml").read_text().replace(replaced.model_hash, part.model_hash)
    path = scratch / f"{_PROFILE}.toml"
    path.write_text(text)
    return str(path), folder


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _read(files: list[Path], *, threads: int) -> float:
    """Seconds to read all files once, from a cold cache."""
    _drop_caches()
    blocks = [(path, begin) for path in files for begin in range(0, path.stat().st_size, _BLOCK)]
    descriptors = {path: os.open(path, os.O_RDONLY) for path in files}

    def read(block: tuple[Path, int]) -> int:
        return len(os.pread(descriptors[block[0]], _BLOCK, block[1]))

    begun = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, blocks):
            pass
    seconds = time.monotonic() - begun
    for descriptor in descriptors.values():
        os.close(descriptor)
    return seconds


def _measure(profile: str, folder: Path, ranks: int) -> tuple[float, int]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "benchmarks.loading", "--profile", profile, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"')))
    return float(told["seconds"]), int(told["read_bytes"])


def _load(profile: str, folder: Path) -> None:
    """One rank: loads, and rank 0 tells how long it took all of them, and what they read."""
    import torch.distributed as dist

    from parallel.model import load_model
    from parallel.profile import check_model_folder, load_profile
    from parallel.world import join, read_launch

    world = join(read_launch(), device_kind="auto")
    files = check_model_folder(load_profile(profile), folder)
    if world.rank == 0:
        _drop_caches()
    before = _bytes_read()
    world.all_true(True)  # a barrier, after the cache is cold
    begun = time.monotonic()
    load_model(files, world=world, dtype="bfloat16")
    world.all_true(True)
    seconds = time.monotonic() - begun
    read = [_bytes_read() - before]
    if world.world_size > 1:
        read = [0] * world.world_size
        dist.all_gather_object(read, _bytes_read() - before)
    if world.rank == 0:
        print(json.dumps({"seconds": seconds, "read_bytes": sum(read)}), flush=True)
    world.leave()


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


if __name__ == "__main__":
    main()
