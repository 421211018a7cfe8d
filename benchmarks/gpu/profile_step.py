"""Where a denoising step's time goes on one card: kernels alone, halves of a block, whole steps, and a profile.

    python -m benchmarks.gpu.profile_step --profile wan2.1-t2v-1.3b --output DIR

Everything that is compared is interleaved over several rounds, with the card's clock and power beside every figure,
because a card under load does not keep its clock. Leaves OUTPUT/step.json, and the profiler's tables as text.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffsynth.models.wan_video_dit import rope_apply
from diffsynth.pipelines.wan_video import model_fn_wan_video
from torch.profiler import ProfilerActivity, profile

from parallel.attention import Sequence
from parallel.bench import parse_shape
from parallel.bench_variants import ALONE, Case, diffsynth_loop, our_loop, random_dit, sharing
from parallel.card import CardSampler, matmul_tflops
from parallel.forward import BlockRunner, Modulation, after_attention, prepare_dit, queries_keys_values
from parallel.kernels import choose_kernel, try_kernels
from parallel.rope import RopeTables, TokenGrid
from parallel.world import join, read_launch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", default="wan2.1-t2v-1.3b")
    parser.add_argument("--shape", type=parse_shape, default=(480, 832, 81))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels-only", action="store_true", help="the attention kernels, and no more")
    options = parser.parse_args()
    world = join(read_launch(), device_kind="auto")
    device = world.device
    out: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}

    def save() -> None:
        (options.output / "step.json").write_text(json.dumps(out, indent=1))

    with torch.no_grad():
        out["matmul_tflops"] = matmul_tflops(device, torch.bfloat16)
        plain = random_dit(options.profile, world, torch.bfloat16)
        ours, compiled = sharing(plain), sharing(plain)
        prepare_dit(ours, compile_blocks=False)
        prepare_dit(compiled, compile_blocks=True)
        height, width, num_frames = options.shape
        grid = TokenGrid((num_frames - 1) // 4 + 1, height // 16, width // 16)
        kernels = _kernels(plain, grid, device)
        out["kernels"] = compare(kernels, options.rounds, 5)
        report("kernels", out["kernels"])
        out["kernel_errors"] = _errors(plain, device)
        out["sustained_ms"] = {name: _sustained(run, device) for name, run in kernels.items() if "lse" not in name}
        print(out["kernel_errors"], *out["sustained_ms"].items(), sep="\n", flush=True)
        save()
        if options.kernels_only:
            return
        out["halves"] = compare(_halves(plain, grid, device), options.rounds, 5)
        report("halves", out["halves"])
        save()
        case = Case(height=height, width=width, num_frames=num_frames)
        loops: dict[str, Callable[[], Any]] = {
            "diffsynth": lambda: diffsynth_loop(plain, case, 2, model_fn_wan_video),
            "ours": lambda: our_loop(ours, case, world, 2, ALONE),
            "ours-compiled": lambda: our_loop(compiled, case, world, 2, ALONE),
        }
        out["two_steps"] = compare(loops, options.rounds, 1)
        report("two steps", out["two_steps"])
        save()
        for name, loop in loops.items():
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
                loop()
                torch.cuda.synchronize()
            averages = profiler.key_averages()
            for key in ("self_cuda_time_total", "self_cpu_time_total"):
                table = averages.table(sort_by=key, row_limit=30, max_name_column_width=90)
                (options.output / f"{name}.{key}.txt").write_text(table)
                if key == "self_cuda_time_total":
                    print(name, *[line[:95] + line[-90:] for line in table.splitlines()[:28]], sep="\n", flush=True)
    save()


def compare(runs: dict[str, Callable[[], Any]], rounds: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each, in rounds that begin with another one each time."""
    rows: dict[str, Any] = {}
    for name, run in list(runs.items()):
        try:
            run()
            torch.cuda.synchronize()
            rows[name] = {"ms": [], "clock": []}
        except RuntimeError as error:
            rows[name] = {"failed": str(error).splitlines()[0]}
            del runs[name]
    names = list(runs)
    for number in range(rounds):
        for name in itertools.islice(itertools.cycle(names), number, number + len(names)):
            with CardSampler(torch.device("cuda")) as sampler:
                for _ in range(repeats):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begun = time.perf_counter()
                    begin.record()
                    runs[name]()
                    host = time.perf_counter() - begun
                    end.record()
                    torch.cuda.synchronize()
                    rows[name]["ms"].append(round(begin.elapsed_time(end), 3))
                    rows[name]["host_ms"] = round(host * 1000, 3)
            rows[name]["clock"].append(sampler.medians())
    return rows


def report(title: str, rows: dict[str, Any]) -> None:
    print(f"== {title}")
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:28} failed: {row['failed'][:150]}")
            continue
        ms = row["ms"]
        last = row["clock"][-1]
        print(f"{name:28} median {statistics.median(ms):9.2f} min {min(ms):9.2f} max {max(ms):9.2f} host "
              f"{row['host_ms']:9.2f} {last}", flush=True)  # fmt: skip


def _kernels(dit: Any, grid: TokenGrid, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Every attention kernel that runs here, on q, k and v as a rank alone has them: (1, tokens, heads, head_dim)."""
    heads = dit.blocks[0].num_heads
    head_dim = dit.dim // heads
    q, k, v = (torch.randn(1, grid.num_tokens, heads, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    runs: dict[str, Callable[[], Any]] = {}
    for kernel, refusal in try_kernels(device, torch.bfloat16, head_dim):
        print(f"{kernel.name}: {refusal or 'runs'}", flush=True)
        if refusal is None:
            runs[kernel.name] = functools.partial(kernel.attend, q, k, v)
            runs[f"{kernel.name} with lse"] = functools.partial(kernel.attend_with_lse, q, k, v)
    return runs


def _errors(dit: Any, device: torch.device) -> dict[str, float]:
    """Relative error of each kernel's result against attention in float64, over 4,096 tokens."""
    head_dim = dit.dim // dit.blocks[0].num_heads
    q, k, v = (torch.randn(1, 4096, 4, head_dim, device=device).to(torch.bfloat16) for _ in range(3))
    by_head = [each.transpose(1, 2).double() for each in (q, k, v)]
    scores = by_head[0] @ by_head[1].transpose(-1, -2) / head_dim**0.5
    exact = (scores.softmax(-1) @ by_head[2]).transpose(1, 2)
    lse = scores.logsumexp(-1).transpose(1, 2)
    errors = {}
    for kernel, refusal in try_kernels(device, torch.bfloat16, head_dim):
        if refusal is None:
            out, found = kernel.attend_with_lse(q, k, v)
            errors[kernel.name] = float((kernel.attend(q, k, v) - exact).norm() / exact.norm())
            errors[f"{kernel.name} with lse"] = float((out - exact).norm() / exact.norm())
            errors[f"{kernel.name}, lse"] = float((found - lse).abs().max())
    return errors


def _sustained(run: Callable[[], Any], device: torch.device) -> list[Any]:
    """For two seconds without a pause: milliseconds, MHz and W in eight parts."""
    parts = []
    for _ in range(8):
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < 0.25:
            run()
            torch.cuda.synchronize()
            count += 1
        ms = (time.perf_counter() - begun) / count * 1000
        parts.append([round(ms, 2), torch.cuda.clock_rate(device), round(torch.cuda.power_draw(device) / 1000)])
    return parts


def _halves(dit: Any, grid: TokenGrid, device: torch.device) -> dict[str, Callable[[], Any]]:
    block, dtype = dit.blocks[0], torch.bfloat16
    tokens = grid.num_tokens
    x = torch.randn(1, tokens, dit.dim, device=device, dtype=dtype)
    context = torch.randn(1, 512, dit.dim, device=device, dtype=dtype)
    projected = torch.randn(1, 1, 6, dit.dim, device=device, dtype=dtype)
    table = RopeTables(device).table(dit, grid, begin=0, length=tokens, padded=tokens)
    sequence = Sequence(ALONE, tokens)
    modulation = Modulation(embedded=projected[:, :, 0], projected=projected, later=None)
    arguments = (block, x, projected, None, table.cos, table.sin)
    q, k, v = queries_keys_values(*arguments)
    attended = sequence.attend_alone(q, k, v)
    before, after = torch.compile(queries_keys_values), torch.compile(after_attention)
    kernel = choose_kernel(device, dtype, dit.dim // block.num_heads)
    eager_runner, runner = BlockRunner(compile_blocks=False), BlockRunner(compile_blocks=True)
    freqs = torch.cat([
        f[: n].view(*s, -1).expand(grid.frames, grid.height, grid.width, -1)
        for f, n, s in zip(dit.freqs, (grid.frames, grid.height, grid.width),
                           ((grid.frames, 1, 1), (1, grid.height, 1), (1, 1, grid.width)), strict=True)
    ], dim=-1).reshape(tokens, 1, -1).to(device)  # fmt: skip
    return {
        "before": lambda: queries_keys_values(*arguments),
        "before compiled": lambda: before(*arguments),
        f"attend ({kernel.name})": lambda: sequence.attend_alone(q, k, v),
        "after": lambda: after_attention(block, x, attended, context, projected, None),
        "after compiled": lambda: after(block, x, attended, context, projected, None),
        "block": lambda: eager_runner.run(block, x, context, modulation, table, sequence),
        "block compiled": lambda: runner.run(block, x, context, modulation, table, sequence),
        "diffsynth block": lambda: type(block).forward(block, x, context, projected[:, 0], freqs),
        "diffsynth rope": lambda: rope_apply(x, freqs, block.num_heads),
        "ffn": lambda: block.ffn(x),
        "linear": lambda: block.self_attn.q(x),
        "norm_q": lambda: block.self_attn.norm_q(x),
    }


if __name__ == "__main__":
    main()
