"""The configuration of a worker that serves one model at its real shapes, for benchmarks."""

from pathlib import Path

_CONFIG = """
pool = "test"
worker_id = "bench"
nproc_per_node = {ranks}
device = "{device}"
dtype = "bfloat16"
memory = "{memory}"
heartbeat_seconds = 0.5
work_directory = "{folder}/work"
[parallel]
{parallel}
[topology]
apply = true
[inputs]
schemes = ["file"]
roots = ["{folder}"]
[output]
directory = "{folder}/output"
[[models]]
profile = "{profile}"
path = "{model}"
"""


def write_real_config(
    folder: Path, profile: str, model: Path, *, ranks: int, device: str, memory: str = "resident", parallel: str = ""
) -> Path:
    """The file, with its directories under `folder`. `parallel`: lines of that table, as `ulysses_degree = 2`."""
    path = folder / "reeld.toml"
    path.write_text(
        _CONFIG.format(
            folder=folder,
            profile=profile,
            model=model.resolve(),
            ranks=ranks,
            device=device,
            memory=memory,
            parallel=parallel,
        )
    )
    return path
