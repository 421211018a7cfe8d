"""A loaded model: DiffSynth's own pipeline, from a folder that its profile has checked.

Owns loading through DiffSynth's loader, and what must be changed in the pipeline for several ranks. Leaves
out the check of the folder (`parallel.profile`) and the generation (`parallel.engine`).
"""

from dataclasses import dataclass

import torch
from diffsynth.core import ModelConfig
from diffsynth.pipelines.wan_video import WanVideoPipeline

from parallel.attention import enable_ulysses
from parallel.lora import DEFAULT_CACHE_BYTES, LoraWeights
from parallel.plan import ParallelDegrees, resolve_degrees
from parallel.profile import ModelFiles
from parallel.tiny_registry import register_tiny_models
from parallel.world import World

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model in this rank's memory."""

    files: ModelFiles
    pipeline: WanVideoPipeline
    degrees: ParallelDegrees
    loras: LoraWeights


def load_model(
    files: ModelFiles, *, world: World, dtype: str, lora_cache_bytes: int = DEFAULT_CACHE_BYTES
) -> LoadedModel:
    """Called by every rank. Loads the model onto the rank's device.

    Raises ValueError when the model cannot be split over the ranks, or when DiffSynth does not know the
    files.
    """
    degrees = resolve_degrees(world_size=world.world_size, num_heads=files.profile.num_heads)
    register_tiny_models()
    pipeline = WanVideoPipeline.from_pretrained(
        torch_dtype=DTYPES[dtype],
        device=world.device,
        model_configs=[
            ModelConfig(path=[str(path) for path in paths] if len(paths) > 1 else str(paths[0]))
            for paths in files.paths.values()
        ],
        tokenizer_config=ModelConfig(path=str(files.tokenizer)),
        audio_processor_config=(
            None if files.audio_processor is None else ModelConfig(path=str(files.audio_processor))
        ),
        redirect_common_files=False,
        use_usp=False,  # its initialisation would join the groups again and bind the device last
    )
    if world.world_size > 1:
        for dit in (pipeline.dit, pipeline.dit2):
            if dit is not None:
                enable_ulysses(dit)
        pipeline.use_unified_sequence_parallel = True
        if world.rank != 0:
            # Only rank 0 needs frames; the others would decode the same latents for nothing.
            pipeline.vae.decode = _no_decode
    dits = {name: dit for name in ("dit", "dit2") if (dit := getattr(pipeline, name)) is not None}
    loras = LoraWeights(dits, world, cache_bytes=lora_cache_bytes)
    return LoadedModel(files=files, pipeline=pipeline, degrees=degrees, loras=loras)


def _no_decode(latents: torch.Tensor, **_arguments: object) -> None:
    return None
