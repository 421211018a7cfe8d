"""One forward of DiffSynth's `model_fn_wan_video` for a DiT with separated timesteps (Wan 2.2 TI2V 5B), on N ranks.

Usage: [torchrun -m] tests.distributed.dit_step OUTPUT.safetensors
"""

import sys

import torch
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.pipelines.wan_video import model_fn_wan_video
from safetensors.torch import save_file

from parallel.attention import enable_ulysses
from parallel.world import join, read_launch


def main() -> None:
    world = join(read_launch(), device_kind="cpu")
    torch.manual_seed(0)
    dit = WanModel(
        dim=144,
        in_dim=48,
        ffn_dim=192,
        out_dim=48,
        text_dim=32,
        freq_dim=32,
        eps=1e-6,
        patch_size=(1, 2, 2),
        num_heads=6,
        num_layers=2,
        has_image_input=False,
        seperated_timestep=True,
        require_clip_embedding=False,
        require_vae_embedding=False,
        fuse_vae_embedding_in_latents=True,
    ).eval()
    results = {}
    if world.world_size > 1:
        enable_ulysses(dit)
    # 3 x 5 x 7 = 105 tokens, which 2 ranks cannot share evenly; 3 x 4 x 4 = 48, which they can.
    for name, (height, width) in {"odd": (10, 14), "even": (8, 8)}.items():
        latents = torch.randn(1, 48, 3, height, width)
        with torch.inference_mode():
            results[name] = model_fn_wan_video(
                dit=dit,
                latents=latents,
                timestep=torch.tensor([700.0]),
                context=torch.randn(1, 16, 32),
                fuse_vae_embedding_in_latents=True,
                use_unified_sequence_parallel=world.world_size > 1,
            ).contiguous()
    if world.rank == 0:
        save_file(results, sys.argv[1])
    world.leave()


if __name__ == "__main__":
    main()
