"""Seconds a denoising step: plain DiffSynth, its own USP, and ours in every split, side by side in one run.

Run on every rank: `torchrun --nproc-per-node N -m parallel.bench --profile wan2.1-t2v-14b --output result.json`, or
through `reeld bench generate`. The variants take turns, round after round, each round beginning with another one, and
every figure has the card's clock and power beside it: under a power limit a card does not keep its speed, and what ran
later would look slower than it is. Text encoder and VAE take no part. Leaves out what is compared
(`parallel.bench_variants`) and rendering (`ops.bench`).
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffsynth.pipelines.wan_video import model_fn_wan_video
from torch import Tensor

from parallel.bench_variants import (
    Case,
    Variant,
    diffsynth_loop,
    our_variants,
    random_dit,
    resident_variants,
    without_added_kernels,
)
from parallel.card import CardSampler, matmul_tflops, synchronise
from parallel.forward import shape_of
from parallel.model import load_dit
from parallel.profile import check_model_folder, load_profile
from parallel.split import CPU, CUDA, ParallelDegrees, choose_degrees, step_flops
from parallel.strategy import MemorySettings
from parallel.world import World, join, read_launch

# What a variant may fail with without ending the benchmark: its row then says why.
_FAILURES = (RuntimeError, ValueError, ImportError, AssertionError, AttributeError, TypeError)
VIDEO_STEPS = 50


def main() -> None:
    options = _options()
    world = join(read_launch(), device_kind=options.device)
    dtype = getattr(torch, options.dtype)
    report: dict[str, Any] = {
        "profile": options.profile,
        "weights": str(options.model) if options.model else "random",
        "world_size": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": options.dtype,
        "steps": options.steps,
        "rounds": options.rounds,
        "matmul_tflops": matmul_tflops(world.device, dtype),
        "results": [],
    }
    bench = _Bench(options, world, report)
    vae_factor = load_profile(options.profile).height_multiple // 2
    for height, width, num_frames in options.shape:
        case = Case(
            height=height,
            width=width,
            num_frames=num_frames,
            guided=not options.no_guidance,
            vae_factor=vae_factor,
        )
        bench.run(case, dtype)
    world.leave()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="wan2.1-t2v-1.3b")
    parser.add_argument("--model", type=Path, help="a model folder of that profile; without it weights are random")
    parser.add_argument("--shape", type=parse_shape, nargs="+", default=[(480, 832, 81)], help="HEIGHTxWIDTHxFRAMES")
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", default=[], help="prefixes of the variants to run")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile of the blocks")
    parser.add_argument("--fsdp", action="store_true", help="also with the weights spread over the ranks")
    parser.add_argument("--no-guidance", action="store_true", help="cfg_scale 1: one forward a step")
    parser.add_argument("--float32-reference", action="store_true", help="errors against plain DiffSynth in float32")
    parser.add_argument("--every-card", action="store_true", help="also one rank's variants on every rank at once")
    parser.add_argument("--tables", type=Path, help="a folder for torch.profiler's tables of rank 0, by variant")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def parse_shape(text: str) -> tuple[int, int, int]:
    """HEIGHTxWIDTHxFRAMES. Raises ValueError for anything else."""
    height, width, num_frames = (int(part) for part in text.split("x"))
    return height, width, num_frames


class _Bench:
    def __init__(self, options: argparse.Namespace, world: World, report: dict[str, Any]) -> None:
        self._options = options
        self._world = world
        self._report = report
        self._reference: Tensor | None = None

    def run(self, case: Case, dtype: torch.dtype) -> None:
        """Called by every rank. All variants of one case, the sharded ones after the others' weights are gone."""
        self._reference = None
        options = self._options
        dit = self._dit(dtype)
        variants = resident_variants(dit, case, self._world, compiled=options.compile)
        if options.float32_reference:
            exact = copy.deepcopy(dit).float()
            with without_added_kernels():
                self._reference = diffsynth_loop(exact, case, options.steps, model_fn_wan_video)
            del exact
        chosen = self._chosen(case, dit)
        self._take_turns([variant for variant in variants if self._wanted(variant)], case, dit, chosen)
        if options.fsdp and self._world.world_size > 1:
            del dit, variants
            gc.collect()
            if self._world.device.type == "cuda":
                torch.cuda.empty_cache()
            dit = self._dit(dtype, sharded=True)
            label = "ours-compiled fsdp" if options.compile else "ours fsdp"
            variants = our_variants(dit, label, case, self._world, compiled=options.compile, sharded=True)
            self._take_turns([variant for variant in variants if self._wanted(variant)], case, dit, chosen)

    def _dit(self, dtype: torch.dtype, *, sharded: bool = False) -> Any:
        if self._options.model is None:
            return random_dit(self._options.profile, self._world, dtype, sharded=sharded)
        files = check_model_folder(load_profile(self._options.profile), self._options.model)
        memory = MemorySettings("fsdp") if sharded else MemorySettings()
        return load_dit(files, world=self._world, dtype=self._options.dtype, memory=memory)

    def _wanted(self, variant: Variant) -> bool:
        only = self._options.only
        return not only or any(variant.name.startswith(prefix) for prefix in only)

    def _chosen(self, case: Case, dit: Any) -> ParallelDegrees:
        return choose_degrees(
            world_size=self._world.world_size,
            shape=shape_of(dit),
            num_tokens=case.num_tokens,
            guided=case.guided,
            machine=CUDA if self._world.device.type == "cuda" else CPU,
        )

    def _take_turns(self, variants: list[Variant], case: Case, dit: Any, chosen: ParallelDegrees) -> None:
        rows = {variant.name: self._warm_up(variant, case, chosen) for variant in variants}
        flops = (2 if case.guided else 1) * step_flops(shape_of(dit), case.num_tokens)
        left = [variant for variant in variants if "failed" not in rows[variant.name]]
        for number in range(self._options.rounds):
            for variant in _from(left, number):
                self._time(variant, rows[variant.name])
                self._conclude(variant, rows[variant.name], flops)
        if self._options.every_card and self._world.world_size > 1:
            for variant in left:
                if variant.ranks == 1:
                    rows[variant.name]["seconds_per_step_by_rank"] = self._everywhere(variant)
                    self._save()
        if self._options.tables is not None:
            for variant in left:
                self._profile(variant, self._options.tables)

    def _everywhere(self, variant: Variant) -> list[float]:
        """Called by every rank. A step of one rank's variant on each, all at once: cards of one kind are not alike,
        and ranks that work together wait for the slowest."""
        variant.run(1)  # compiles, on those that only looked on so far
        synchronise(self._world.device)
        self._world.all_true(True)
        begun = time.perf_counter_ns()
        variant.run(self._options.steps)
        synchronise(self._world.device)
        nanoseconds = self._world.gather_numbers(time.perf_counter_ns() - begun)
        return [round(each / 1e9 / self._options.steps, 4) for each in nanoseconds]

    def _warm_up(self, variant: Variant, case: Case, chosen: ParallelDegrees) -> dict[str, Any]:
        """Called by every rank. The first steps: compiles, and gives the latents that are compared."""
        row: dict[str, Any] = {
            "variant": variant.name,
            "ranks": variant.ranks,
            "shape": [case.height, case.width, case.num_frames],
            "tokens": case.num_tokens,
            "chosen": variant.degrees == chosen,
            "repeats": [],
            "card": [],
        }
        self._report["results"].append(row)
        try:
            if variant.ranks > 1 or self._world.rank == 0:
                begun = time.perf_counter()
                latents = variant.run(self._options.steps)
                synchronise(self._world.device)
                row["warm_up_seconds"] = round(time.perf_counter() - begun, 3)
                if self._reference is None and variant.name == "diffsynth":
                    self._reference = latents
                elif self._reference is not None:
                    reference = self._reference.double()
                    row["relative_error"] = float((latents.double() - reference).norm() / reference.norm())
        except _FAILURES as error:
            row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        self._world.all_true(True)  # over gloo: who waits here does not hold the device
        return row

    def _time(self, variant: Variant, row: dict[str, Any]) -> None:
        """Called by every rank."""
        device = self._world.device
        if variant.ranks > 1 or self._world.rank == 0:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with CardSampler(device) as sampler:
                begun = time.perf_counter()
                variant.run(self._options.steps)
                synchronise(device)
                row["repeats"].append(round((time.perf_counter() - begun) / self._options.steps, 4))
            row["card"].append(sampler.medians())
            if device.type == "cuda":
                row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
                # What the allocator holds, for all variants so far.
                row["reserved_gib"] = round(torch.cuda.memory_reserved(device) / 2**30, 2)
        self._world.all_true(True)

    def _profile(self, variant: Variant, folder: Path) -> None:
        """Called by every rank. What rank 0 spends its time on, by operator and kernel."""
        from torch.profiler import ProfilerActivity, profile

        if variant.ranks == 1 and self._world.rank != 0:
            self._world.all_true(True)
            return
        on_cuda = self._world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        with profile(activities=activities) as profiler:
            variant.run(self._options.steps)
            synchronise(self._world.device)
        if self._world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=100)
            (folder / f"{variant.name.replace(' ', '_')}.txt").write_text(table)
        self._world.all_true(True)

    def _conclude(self, variant: Variant, row: dict[str, Any], flops: float) -> None:
        if self._world.rank != 0:
            return
        row["seconds_per_step"] = round(statistics.median(row["repeats"]), 4)
        row["seconds_per_video"] = round(VIDEO_STEPS * row["seconds_per_step"], 1)
        rate = flops / row["seconds_per_step"] / variant.ranks / 1e12
        row["tflops_per_card"] = round(rate, 2)
        row["fraction_of_matmul_peak"] = round(rate / self._report["matmul_tflops"]["best"], 3)
        print(json.dumps({key: row[key] for key in row if key not in ("shape", "tokens")}), flush=True)
        self._save()

    def _save(self) -> None:
        if self._world.rank == 0:
            self._options.output.write_text(json.dumps(self._report, indent=1))


def _from(variants: Sequence[Variant], begin: int) -> list[Variant]:
    place = begin % len(variants) if variants else 0
    return [*variants[place:], *variants[:place]]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
