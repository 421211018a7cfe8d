"""The conditions of a generation: what the DiT is given besides the timestep, on every rank.

Owns running DiffSynth's own pipeline units on rank 0 alone (noise, text, CLIP, VAE encoding, VACE, ...), as
`WanVideoPipeline.__call__` of diffsynth 2.1.12 does, and spreading what they made: a JSON description over the control
group, the tensors over the default group, bit for bit. The peers need no text encoder, no CLIP and no tokenizer.
Leaves out how the job's inputs were opened (`parallel.inputs`) and the denoising (`parallel.denoise`).
"""

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.wan_video import (
    WanVideoPipeline,
    WanVideoUnit_CfgMerger,
    WanVideoUnit_PromptEmbedder,
    WanVideoUnit_TeaCache,
    WanVideoUnit_UnifiedSequenceParallel,
    model_fn_wan_video,
)

from parallel.outcome import PreparationError, outcome_of
from parallel.packing import Packing, describe_tensor, rebuild
from parallel.vae import Tiles, encode_shared
from parallel.world import World

# DiffSynth's units that are not run: splitting the sequence, caching steps and the two branches are ours.
_NOT_RUN = (WanVideoUnit_UnifiedSequenceParallel, WanVideoUnit_TeaCache, WanVideoUnit_CfgMerger)

# Arguments of `__call__` that never reach the units as shared inputs, as in its body.
_PROMPTS = {"positive": ("prompt", "vap_prompt"), "negative": ("negative_prompt", "negative_vap_prompt")}
_BOTH = ("tea_cache_l1_thresh", "tea_cache_model_id", "num_inference_steps")
_OF_THE_LOOP = ("switch_DiT_boundary", "progress_bar_cmd", "output_type")

# What the ranks are given: what the DiT takes, and what the steps and the decoding need beside it.
_KEPT = frozenset(inspect.signature(model_fn_wan_video).parameters) - {
    "dit", "motion_controller", "vace", "vap", "animate_adapter", "kwargs",
} | {
    "first_frame_latents", "height", "width", "num_frames", "cfg_scale", "num_inference_steps", "denoising_strength",
    "sigma_shift", "tiled", "tile_size", "tile_stride",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conditions:
    """What `model_fn_wan_video` is given in every step, under its own argument names; equal bits on every rank.

    `shared["latents"]` is where denoising begins: (1, channels, frames, height, width) of the latent video, in the
    pipeline's dtype. `positive["context"]` and `negative["context"]` are the text's, (1, 512, text_dim); without
    guidance (`cfg_scale` 1) the negative is the positive one. `reference_length` leading latent frames are VACE's
    references, to be cut off before decoding.
    """

    shared: dict[str, Any]
    positive: dict[str, Any]
    negative: dict[str, Any]
    reference_length: int


class PromptCache:
    """Text embeddings of one loaded model, least recently used first out; on rank 0 only.

    A service's negative prompt is the same in almost every job. 32 embeddings of UMT5-XXL in bfloat16 are 128 MiB.
    """

    def __init__(self, capacity: int = 32) -> None:
        self._capacity = capacity
        self._embeddings: OrderedDict[str, torch.Tensor] = OrderedDict()

    def embed(self, prompt: str, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The embedding of `prompt`: the kept one, or what `encode` makes. Not to be written to."""
        if prompt not in self._embeddings:
            self._embeddings[prompt] = encode()
            if len(self._embeddings) > self._capacity:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(prompt)
        return self._embeddings[prompt]


@torch.no_grad()
def prepare_conditions(
    pipeline: WanVideoPipeline,
    arguments: Callable[[], Mapping[str, Any]],
    world: World,
    *,
    prompts: PromptCache,
    share_vae: bool = True,
) -> Conditions:
    """Called by every rank; `arguments` (of `WanVideoPipeline.__call__`) are asked for on rank 0 alone.

    With `share_vae` every rank has the VAE and encodes its part of what the units give it. Sets the scheduler's
    timesteps on every rank. Raises on rank 0 whatever `arguments`, DiffSynth and torch raise, ValueError
    for an argument that `__call__` does not have; then PreparationError on every peer.
    """
    if world.rank != 0:
        return _assist(pipeline, world)
    try:
        with _shared_encoding(pipeline.vae, world) if share_vae else contextlib.nullcontext():
            conditions = _run_units(pipeline, arguments(), prompts)
        packing = Packing()
        described = packing.describe([conditions.shared, conditions.positive, conditions.negative])
        tensors = [tensor.to(pipeline.device) for tensor in packing.tensors]
    except Exception as error:
        # The peers wait for the description and must hear of it, whatever it was; but those that failed as well, while
        # they encoded with this rank, wait for nothing.
        failed = outcome_of(error, world.rank)
        world.say_json({"failed": failed.code, "message": failed.message})
        raise
    world.broadcast_json(
        {
            "conditions": described,
            "tensors": [describe_tensor(tensor) for tensor in packing.tensors],
            "reference_length": conditions.reference_length,
        }
    )
    world.broadcast_tensors(tensors)
    return conditions


def call_defaults() -> dict[str, Any]:
    """The default arguments of `WanVideoPipeline.__call__`."""
    parameters = inspect.signature(WanVideoPipeline.__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def unit_inputs(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """`inputs_shared`, `inputs_posi` and `inputs_nega` as `__call__` makes them from its arguments.

    Raises ValueError for an argument that `__call__` does not have.
    """
    known = call_defaults()
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ValueError(f"not among the arguments of WanVideoPipeline.__call__: {', '.join(unknown)}")
    values = known | dict(arguments)
    positive = {name: values[name] for name in (*_PROMPTS["positive"], *_BOTH)} | {"positive": True}
    negative = {name: values[name] for name in (*_PROMPTS["negative"], *_BOTH)} | {"positive": False}
    not_shared = {*_BOTH, *_PROMPTS["positive"], *_PROMPTS["negative"], *_OF_THE_LOOP}
    shared = {name: value for name, value in values.items() if name not in not_shared}
    return shared, positive, negative


def _run_units(pipeline: WanVideoPipeline, arguments: Mapping[str, Any], prompts: PromptCache) -> Conditions:
    shared, positive, negative = unit_inputs(arguments)
    steps = positive["num_inference_steps"]
    _set_timesteps(pipeline, shared | {"num_inference_steps": steps})
    references = shared["vace_reference_image"]
    for unit in pipeline.units:
        if isinstance(unit, _NOT_RUN):
            continue
        runnable = _CachedPromptEmbedder(prompts) if isinstance(unit, WanVideoUnit_PromptEmbedder) else unit
        shared, positive, negative = pipeline.unit_runner(runnable, pipeline, shared, positive, negative)
    return Conditions(
        shared=_kept(shared | {"num_inference_steps": steps}),
        positive=_kept(positive),
        negative=_kept(negative),
        reference_length=0 if references is None else len(references) if isinstance(references, list) else 1,
    )


class _CachedPromptEmbedder(WanVideoUnit_PromptEmbedder):  # type: ignore[misc]  # diffsynth has no types
    """DiffSynth's unit, but a text that is known runs no encoder and loads none to the device."""

    def __init__(self, prompts: PromptCache) -> None:
        super().__init__()
        self._prompts = prompts

    def process(self, pipe: WanVideoPipeline, prompt: str, positive: bool) -> dict[str, Any]:
        def encode() -> torch.Tensor:
            made: torch.Tensor = super(_CachedPromptEmbedder, self).process(pipe, prompt, positive)["context"]
            return made

        return {"context": self._prompts.embed(prompt, encode)}


@contextlib.contextmanager
def _shared_encoding(vae: WanVideoVAE, world: World) -> Iterator[None]:
    """On rank 0: within the block every `vae.encode` calls the peers, who wait in `_assist`."""

    def encode(
        videos: Iterable[torch.Tensor],
        device: torch.device,
        tiled: bool = False,
        tile_size: tuple[int, int] = (34, 34),
        tile_stride: tuple[int, int] = (18, 16),
    ) -> torch.Tensor:
        made = []
        tiles = Tiles(tile_size, tile_stride) if tiled else None
        for each in videos:
            video = each.unsqueeze(0).to(device)
            if tiles is not None:
                tiles = tiles.scaled(vae.upsampling_factor)  # again for each video, as DiffSynth does
            request = describe_tensor(video) | {"tiles": tiles and [tiles.size, tiles.stride]}
            world.broadcast_json({"encode": request})
            latents = encode_shared(vae, video, video.shape, world, dtype=video.dtype, tiles=tiles)
            assert latents is not None
            made.append(latents.squeeze(0))
        return torch.stack(made)

    vae.encode = encode
    try:
        yield
    finally:
        del vae.encode


def _assist(pipeline: WanVideoPipeline, world: World) -> Conditions:
    """On the peers: encodes with rank 0 for as long as it asks, until it sends the conditions or fails."""
    while True:
        match world.broadcast_json():
            case {"encode": {"shape": shape, "dtype": dtype, "tiles": tiles}}:
                pipeline.load_models_to_device(["vae"])
                encode_shared(
                    pipeline.vae,
                    None,
                    shape,
                    world,
                    dtype=getattr(torch, dtype),
                    tiles=Tiles(*map(tuple, tiles)) if tiles else None,
                )
            case {"failed": code, "message": message}:
                raise PreparationError(code, message)
            case {"conditions": _} as message:
                return _receive(message, pipeline, world)


def _receive(message: Mapping[str, Any], pipeline: WanVideoPipeline, world: World) -> Conditions:
    tensors = [
        torch.empty(tensor["shape"], dtype=getattr(torch, tensor["dtype"]), device=pipeline.device)
        for tensor in message["tensors"]
    ]
    world.broadcast_tensors(tensors)
    placed = [
        received.cpu() if tensor["on_host"] else received
        for received, tensor in zip(tensors, message["tensors"], strict=True)
    ]
    shared, positive, negative = rebuild(message["conditions"], placed)
    _set_timesteps(pipeline, shared)
    return Conditions(shared=shared, positive=positive, negative=negative, reference_length=message["reference_length"])


def _set_timesteps(pipeline: WanVideoPipeline, shared: Mapping[str, Any]) -> None:
    pipeline.scheduler.set_timesteps(
        shared["num_inference_steps"], denoising_strength=shared["denoising_strength"], shift=shared["sigma_shift"]
    )


def _kept(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.contiguous() if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
        if name in _KEPT and value is not None
    }
