"""The shared VAE against DiffSynth's own, on four ranks: -m tests.distributed.vae_ranks REPORT

Smaller groups are the first ranks of the four: what is shared knows only its `world_size`.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from diffsynth.models.wan_video_vae import VideoVAE38_, VideoVAE_, WanVideoVAE, WanVideoVAE38
from diffsynth.pipelines.wan_video import WanVideoPipeline

from parallel.bands import cut_bands
from parallel.decode import decode_frames
from parallel.outcome import NonFiniteError
from parallel.vae import Tiles, decode_bands, decode_tiles, encode_shared, gather_bands
from parallel.world import World, join, read_launch
from tests.distributed.forked import run_ranks

TILES = Tiles(size=(4, 5), stride=(2, 3))


def small_vaes() -> dict[str, WanVideoVAE]:
    """Both of Wan's VAEs with 8 base channels, all of their weights random and none zero."""
    wan_2_1, wan_2_2 = WanVideoVAE(z_dim=16), WanVideoVAE38(z_dim=48, dim=8)
    wan_2_1.model = VideoVAE_(dim=8, z_dim=16)
    wan_2_2.model = VideoVAE38_(dim=8, dec_dim=8, z_dim=48)
    torch.manual_seed(0)
    for vae in (wan_2_1, wan_2_2):
        for name, parameter in vae.model.eval().named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
            elif "gamma" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return {"2.1": wan_2_1, "2.2": wan_2_2}


def group_of(world: World, size: int) -> World:
    return cast(World, SimpleNamespace(rank=world.rank, world_size=size, device=world.device))


def whole(vae: WanVideoVAE, world: World, shape: tuple[int, int, int], size: int, dtype: torch.dtype) -> Any:
    """Largest errors of decoding and of encoding on the first `size` ranks; on rank 0, else None."""
    frames, height, width = shape
    latents = torch.randn(1, vae.z_dim, frames, height, width).to(dtype)
    factor = vae.upsampling_factor
    video = (torch.rand(1, 3, 4 * frames - 3, height * factor, width * factor) * 2 - 1).to(dtype)
    bands = cut_bands(height, width, world_size=size, rank=world.rank)
    pieces = [gather_bands(part, bands) for part in decode_bands(vae, latents, bands)]
    encoded = None
    if world.rank < size:
        given = video if world.rank == 0 else None
        encoded = encode_shared(vae, given, video.shape, group_of(world, size), dtype=dtype, tiles=None)
    if world.rank > 0:
        return None
    decoded = torch.cat([piece for piece in pieces if piece is not None], dim=2)
    assert encoded is not None
    of_decoding = (decoded - vae.model.decode(latents, vae.scale)).abs().max()
    of_encoding = (encoded - vae.model.encode(video, vae.scale)).abs().max()
    return [float(of_decoding), float(of_encoding)]


def tiled(vae: WanVideoVAE, world: World, size: int) -> Any:
    """Whether the tiles give DiffSynth's bits, decoding and encoding; on rank 0, else None."""
    latents, factor = torch.randn(1, vae.z_dim, 2, 7, 9), vae.upsampling_factor
    video = torch.rand(1, 3, 5, 7 * factor, 9 * factor) * 2 - 1
    if world.rank >= size:
        return None
    group, given = group_of(world, size), video if world.rank == 0 else None
    decoded = decode_tiles(vae, latents, TILES, group)
    encoded = encode_shared(vae, given, video.shape, group, dtype=video.dtype, tiles=TILES.scaled(factor))
    if decoded is None or encoded is None:
        return None
    named: dict[str, Any] = {"tiled": True, "tile_size": TILES.size, "tile_stride": TILES.stride}
    expected = vae.decode(latents, "cpu", **named), vae.encode(video, "cpu", **named)
    return [torch.equal(decoded.clamp(-1, 1), expected[0]), torch.equal(encoded, expected[1])]


def frames(vae: WanVideoVAE, world: World) -> dict[str, Any]:
    """Differences of the uint8 frames from DiffSynth's PIL images, and who hears of a NaN."""
    pipeline = WanVideoPipeline(device="cpu", torch_dtype=torch.float32)
    pipeline.vae = vae
    report: dict[str, Any] = {}
    for name, size, tiles, dtype in (
        ("one rank", 1, None, torch.float32),
        ("one rank, bfloat16", 1, None, torch.bfloat16),
        ("four ranks", 4, None, torch.float32),
        ("four ranks, tiles", 4, TILES, torch.float32),
    ):
        vae.model.to(dtype)
        latents = torch.randn(1, vae.z_dim, 2, 7, 9).to(dtype)
        if world.rank < size:
            made = decode_frames(pipeline, latents, group_of(world, size), tiles=tiles)
            if made is not None:
                named = {"tiled": True, "tile_size": tiles.size, "tile_stride": tiles.stride} if tiles else {}
                images = pipeline.vae_output_to_video(vae.decode(latents, "cpu", **named))
                expected = np.stack([np.asarray(image) for image in images])
                difference = np.abs(made.numpy().astype(int) - expected)
                report[name] = [str(made.dtype), int(difference.max()), float((difference > 0).mean())]
    vae.model.to(torch.float32)
    report["not finite"] = []
    for tiles in (None, TILES):
        latents = torch.randn(1, vae.z_dim, 2, 7, 9)
        latents[0, 0, 0, 0, 0] = torch.nan
        try:
            decode_frames(pipeline, latents, world, tiles=tiles)
        except NonFiniteError:
            report["not finite"].append("raised")
    return report


@torch.no_grad()
def main() -> None:
    world = join(read_launch(), device_kind="cpu")
    vaes = small_vaes()
    random.seed(7)
    report: dict[str, Any] = {"whole": [], "bfloat16": [], "tiled": []}
    shapes = [(1, 1, 1), (2, 1, 3), (1, 9, 2)]  # fewer rows and columns than ranks
    shapes += [(random.randint(1, 3), random.randint(2, 9), random.randint(2, 9)) for _ in range(6)]
    for name, vae in vaes.items():
        for shape in shapes:
            for size in range(1, 5):
                report["whole"].append([name, shape, size, whole(vae, world, shape, size, torch.float32)])
        for size in range(1, 5):
            report["tiled"].append([name, size, tiled(vae, world, size)])
        vae.model.to(torch.bfloat16)
        for size in range(1, 5):
            report["bfloat16"].append([name, size, whole(vae, world, (2, 7, 9), size, torch.bfloat16)])
        vae.model.to(torch.float32)
    report |= frames(vaes["2.1"], world)
    Path(f"{sys.argv[1]}.{world.rank}").write_text(json.dumps(report))
    world.leave()


if __name__ == "__main__":
    run_ranks(4, main)
