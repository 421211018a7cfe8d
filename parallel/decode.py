"""From denoised latents to frames in rank 0's memory.

Owns sharing the decode out over the ranks, and quantising on the device: a quarter (float32) or half (bfloat16) of the
bytes are gathered and copied to the host, once, into pinned memory, while the next frames are decoded. Leaves out the
VAE itself (`parallel.vae`) and the video file (`daemon.video`).
"""

from collections.abc import Iterator

import torch
from diffsynth.pipelines.wan_video import WanVideoPipeline

from parallel import collectives
from parallel.bands import ROWS, Bands, cut_bands
from parallel.conditions import Conditions
from parallel.outcome import NonFiniteError
from parallel.vae import Tiles, decode_bands, decode_tiles, gather_bands
from parallel.world import World


def latents_to_decode(latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """The denoised latents without VACE's references; with speech-to-video's motion frames before them.

    What `WanVideoPipeline.__call__` and its post units do, but decided from the conditions: the peers have no audio
    encoder, which is what DiffSynth asks for.
    """
    latents = latents[:, :, conditions.reference_length :]
    motion_latents = conditions.shared.get("motion_latents")
    if motion_latents is not None and not conditions.shared["drop_motion_frames"]:
        latents = torch.cat([motion_latents, latents[:, :, 1:]], dim=2)
    return latents


@torch.no_grad()
def decode_frames(
    pipeline: WanVideoPipeline, latents: torch.Tensor, world: World, *, tiles: Tiles | None, quantised: bool = True
) -> torch.Tensor | None:
    """Called by every rank, with the whole latents (1, channels, frames, height, width) on its device.

    Returns the frames on rank 0, None on the peers: (num_frames, height, width, 3) on the CPU, uint8 by the arithmetic
    of DiffSynth's `vae_output_to_image`; not quantised, they are floats in [-1, 1] in the VAE's dtype. `tiles` None
    decodes whole frames. Raises NonFiniteError on every rank when any rank's part holds a NaN or an infinity.
    """
    pipeline.load_models_to_device(["vae"])
    height, width = latents.shape[-2:]
    finite = torch.ones((), dtype=torch.int32, device=latents.device)
    frames, begun = None, 0
    with collectives.counted_as_one():  # a small frame has fewer bands than there are ranks
        if tiles is None:
            bands = cut_bands(height, width, world_size=world.world_size, rank=world.rank)
            parts = decode_bands(pipeline.vae, latents, bands)
        else:
            bands = Bands(dim=ROWS, sizes=(height,), rank=world.rank)
            parts = _on_rank_0(decode_tiles(pipeline.vae, latents, tiles, world))
        for part in parts:
            finite *= torch.isfinite(part).all()
            part.clamp_(-1, 1)
            piece = gather_bands(quantise(part) if quantised else part, bands)
            if piece is None:
                continue
            if frames is None:
                shape = (latents.shape[2] * 4 - 3, *piece.shape[-2:], 3)
                frames = torch.empty(shape, dtype=piece.dtype, pin_memory=latents.is_cuda)
            ended = begun + piece.shape[2]
            frames[begun:ended].copy_(piece[0].permute(1, 2, 3, 0).contiguous(), non_blocking=True)
            begun = ended
    if world.world_size > 1:
        collectives.all_reduce_min(finite)
    if not finite.item():  # waits for the device, and so for the last copy as well
        raise NonFiniteError(f"the frames hold NaN or infinity (dtype {latents.dtype})")
    return frames


def quantise(video: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] as uint8, on their device and in their dtype's arithmetic, as DiffSynth's."""
    return ((video + 1) * 127.5).clip(0, 255).to(torch.uint8)


def _on_rank_0(video: torch.Tensor | None) -> Iterator[torch.Tensor]:
    if video is not None:
        yield video
