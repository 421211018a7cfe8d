"""The cases of `reference.py` through reeld's own ranks: tests.distributed.ours CASES.json OUTPUT [MEMORY [compile]].

Runs each case with the first few (`splits`) of the splits that its number of heads allows on this many ranks, or with
one that its `split` picks; an output's name is the case's, "|", and the split. `staged` are the plan's inputs.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from parallel.engine import generate_frames
from parallel.forward import prepare_dit
from parallel.model import LoadedModel, load_model
from parallel.outcome import Stop
from parallel.plan import Generate, GenerationPlan, Shutdown
from parallel.profile import check_model_folder, load_profile
from parallel.split import possible_degrees
from parallel.strategy import MemorySettings
from parallel.world import join, read_launch
from tests.distributed.places import check_places
from tests.distributed.random_dit import random_dit


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    memory = MemorySettings(sys.argv[3] if len(sys.argv) > 3 else "resident")
    compiled = "compile" in sys.argv[4:]
    world = join(read_launch(), device_kind="cpu")
    models: dict[tuple[str, str], LoadedModel] = {}
    frames = {}
    for case in cases:
        if world.world_size not in case.get("ranks", [world.world_size]):
            continue
        folder = Path(case["model_folder"])
        key = (case["model_folder"], case["dtype"])
        if key not in models:
            files = check_model_folder(load_profile(folder.name), folder)
            models[key] = load_model(files, world=world, dtype=case["dtype"], memory=memory, compile_blocks=compiled)
        model = models[key]
        own = model.pipeline.dit
        if case.get("dit"):
            model.pipeline.dit = random_dit(**case["dit"])
            prepare_dit(model.pipeline.dit, compile_blocks=False)
        arguments = dict(case["arguments"])
        thresholds = {"tea_cache_l1_thresh": arguments.pop("tea_cache_l1_thresh", None)}
        arguments.pop("tea_cache_model_id", None)
        boundary = arguments.pop("switch_DiT_boundary", 0.875)
        inputs = {"input_image": case.get("input_image")} | case.get("staged", {})
        possible = list(
            possible_degrees(
                world_size=world.world_size,
                num_heads=model.pipeline.dit.blocks[0].num_heads,
                guided=arguments["cfg_scale"] != 1,
            )
        )
        for degrees in possible[: case["splits"]] if "splits" in case else [possible[case["split"] % len(possible)]]:
            plan = GenerationPlan(
                job_id=case["name"],
                attempt=1,
                task="",
                model=folder.name,
                switch_boundary=boundary,
                time_limit_seconds=600,
                **inputs,
                **thresholds,
                **asdict(degrees),
                **arguments,
            )
            # What the peers run is what came over the control group, not what they read from the file.
            command = world.broadcast_command(Generate(plan) if world.rank == 0 else None)
            assert isinstance(command, Generate)
            made = generate_frames(
                command.plan, model, world, progress=lambda *_: None, decide=lambda: Stop.NO, quantised=False
            )
            check_places(world)
            if made is not None:
                split = f"{degrees.cfg_degree}x{degrees.ulysses_degree}x{degrees.ring_degree}"
                frames[f"{case['name']}|{split}"] = made.float().contiguous()
        model.pipeline.dit = own
    if world.rank == 0:
        save_file(frames, sys.argv[2])
    world.broadcast_command(Shutdown("done") if world.rank == 0 else None)
    world.leave()


if __name__ == "__main__":
    main()
