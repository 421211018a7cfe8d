"""The same cases as `reference.py` through reeld's own ranks: torchrun -m tests.distributed.ours CASES.json OUTPUT."""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from parallel.engine import generate_frames
from parallel.model import LoadedModel, load_model
from parallel.outcome import Stop
from parallel.plan import Generate, GenerationPlan, Shutdown
from parallel.profile import check_model_folder, load_profile
from parallel.world import join, read_launch


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    world = join(read_launch(), device_kind="cpu")
    models: dict[tuple[str, str], LoadedModel] = {}
    frames = {}
    for case in cases:
        folder = Path(case["model_folder"])
        key = (case["model_folder"], case["dtype"])
        if key not in models:
            files = check_model_folder(load_profile(folder.name), folder)
            models[key] = load_model(files, world=world, dtype=case["dtype"])
        plan = GenerationPlan(
            job_id=case["name"],
            attempt=1,
            task="",
            model=folder.name,
            switch_boundary=0.875,
            input_image=case["input_image"],
            time_limit_seconds=600,
            **case["arguments"],
        )
        # What the peers run is what came over the control group, not what they read from the file.
        command = world.broadcast_command(Generate(plan) if world.rank == 0 else None)
        assert isinstance(command, Generate)
        made = generate_frames(command.plan, models[key], world, progress=lambda *_: None, decide=lambda: Stop.NO)
        if made is not None:
            frames[case["name"]] = made.contiguous()
    if world.rank == 0:
        save_file(frames, sys.argv[2])
    world.broadcast_command(Shutdown("done") if world.rank == 0 else None)
    world.leave()


if __name__ == "__main__":
    main()
