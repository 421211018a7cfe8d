"""A loaded model: DiffSynth's own pipeline, from a folder that its profile has checked.

Owns which rank holds which part, in which memory, under the strategy that the configuration names (docs/memory.md),
and what must be changed in the pipeline for several ranks. Leaves out the check of the folder (`profile.py`), building
and reading (`parts.py`, `loading.py`) and the generation (`engine.py`).
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffsynth.models.wan_video_dit_s2v import WanS2VModel
from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer
from diffsynth.pipelines.wan_video import WanVideoPipeline
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Wav2Vec2Processor

from parallel.conditions import PromptCache
from parallel.forward import prepare_dit, shape_of
from parallel.forward_s2v import prepare_s2v
from parallel.forward_vace import prepare_vace
from parallel.host_memory import page_locked
from parallel.layouts import Layout, StoredTensor, read_tensors
from parallel.loading import Destination, Progress, Wanted, load_tensors, stored_by_name
from parallel.lora import DEFAULT_CACHE_BYTES, LoraWeights, local_part
from parallel.offload import OffloadedModels, stream_blocks
from parallel.parts import ATTRIBUTES, BuiltModel, build_models
from parallel.plan import GenerationPlan
from parallel.profile import ModelFiles, ModelPart
from parallel.rope import RopeTables
from parallel.sharding import common_root, let_go, shard_blocks
from parallel.sizes import ModelSizes, sizes_of
from parallel.split import CPU, CUDA, ParallelDegrees, PinnedDegrees, check_pins, choose_degrees
from parallel.strategy import MemorySettings
from parallel.tiny_registry import register_tiny_models
from parallel.vram import MANAGED, ManagedModels, manage_model
from parallel.world import World

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Used by DiffSynth's units, which rank 0 alone runs; the peers do without. The VAE's work is shared out.
ENCODERS = ("text_encoder", "image_encoder", "audio_encoder")
_DITS = ("dit", "dit2")
# What of each is spread over the ranks under fsdp.
_BLOCKS = {"dit": "blocks", "dit2": "blocks", "vace": "vace_blocks", "vace2": "vace_blocks"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model in this rank's memory."""

    files: ModelFiles
    sizes: ModelSizes
    pipeline: WanVideoPipeline
    loras: LoraWeights
    tables: RopeTables
    prompts: PromptCache
    sharded: FSDPModule | None
    """What all blocks are below that are spread over the ranks."""

    def let_go(self) -> None:
        """After the last pass, or one that failed: nothing of it stays in memory, or in the way of the next."""
        if self.sharded is not None:
            let_go(self.sharded)

    def degrees_for(self, plan: GenerationPlan, world: World, pinned: PinnedDegrees) -> ParallelDegrees:
        """The split for one job, by the cost model. Raises ValueError, with every factor, when none is possible."""
        _, step_height, step_width = self.pipeline.dit.patch_size
        frames = (plan.num_frames - 1) // 4 + 1
        height = plan.height // self.pipeline.vae.upsampling_factor // step_height
        width = plan.width // self.pipeline.vae.upsampling_factor // step_width
        return choose_degrees(
            world_size=world.world_size,
            shape=shape_of(self.pipeline.dit),
            num_tokens=frames * height * width,
            guided=plan.cfg_scale != 1.0,
            machine=CUDA if world.device.type == "cuda" else CPU,
            pinned=pinned,
        )


def load_model(
    files: ModelFiles,
    *,
    world: World,
    dtype: str,
    memory: MemorySettings = MemorySettings(),  # noqa: B008  frozen
    pinned: PinnedDegrees | None = None,
    compile_blocks: bool = False,
    lora_cache_bytes: int = DEFAULT_CACHE_BYTES,
    progress: Progress = lambda _done, _total: None,
) -> LoadedModel:
    """Called by every rank. Loads the model under the memory strategy; the ranks read each file once together.

    Raises ValueError when the model cannot be split over the ranks as `pinned` says, when the strategy cannot work
    there, or when DiffSynth does not know the files; ReadError when one cannot be read.
    """
    check_pins(world_size=world.world_size, num_heads=files.profile.num_heads, pinned=pinned or PinnedDegrees())
    memory.check(world_size=world.world_size)
    register_tiny_models()
    pipeline = WanVideoPipeline(device=world.device, torch_dtype=DTYPES[dtype])
    loader = _Loader(pipeline, world, memory)
    layouts = {part.role: _place_part(part, files, loader) for part in files.profile.parts}
    load_tensors(loader.wanted(), world, progress=progress)
    sharded = loader.finish()
    _complete(pipeline, files, world)
    dits = {name: dit for name in _DITS if (dit := getattr(pipeline, name)) is not None}
    compile_blocks = compile_blocks and memory.strategy != "vram_limit"
    for dit in dits.values():
        prepare = prepare_s2v if isinstance(dit, WanS2VModel) else prepare_dit
        prepare(dit, compile_blocks=compile_blocks)
    for vace in (pipeline.vace, pipeline.vace2):
        if vace is not None:
            prepare_vace(vace, compile_blocks=compile_blocks)
    return LoadedModel(
        files=files,
        sizes=sizes_of(files.profile, layouts),
        pipeline=pipeline,
        loras=LoraWeights(dits, world, cache_bytes=lora_cache_bytes),
        tables=RopeTables(world.device),
        prompts=PromptCache(),
        sharded=sharded,
    )


def load_dit(files: ModelFiles, *, world: World, dtype: str, memory: MemorySettings) -> Any:
    """Called by every rank. The folder's first DiT alone, as DiffSynth builds it: for the benchmark.

    Raises ValueError and ReadError as `load_model` does.
    """
    register_tiny_models()
    pipeline = WanVideoPipeline(device=world.device, torch_dtype=DTYPES[dtype])
    loader = _Loader(pipeline, world, memory)
    _place_part(next(part for part in files.profile.parts if part.role.startswith("dit")), files, loader)
    load_tensors(loader.wanted(), world)
    loader.finish()
    return pipeline.dit


def _place_part(part: ModelPart, files: ModelFiles, loader: "_Loader") -> Layout:
    tensors = {path: read_tensors(path) for path in files.paths[part.role]}
    layout = {tensor.name: tensor.shape for each in tensors.values() for tensor in each}
    for built in build_models(part, layout):
        loader.place(built, stored_by_name(tensors))
    return layout


class _Loader:
    """Puts built models into the pipeline, with memory for their weights, and then the weights into that."""

    def __init__(self, pipeline: WanVideoPipeline, world: World, memory: MemorySettings) -> None:
        self._pipeline = pipeline
        self._world = world
        self._memory = memory
        self._dtype: torch.dtype = pipeline.torch_dtype
        self._wanted: dict[tuple[Path, str], tuple[StoredTensor, bool, list[_Place]]] = {}
        # Host memory takes longer to be page-locked (6.5 s for UMT5-XXL) than a warm cache to be read: it is made
        # while what goes to the devices is read.
        self._hosted: list[tuple[Future[dict[str, Destination]], Callable[[], dict[str, Destination]]]] = []
        self._aside = threading.Thread(target=self._allocate_hosted, name="host-memory", daemon=True)
        self._finish: list[Callable[[], None]] = []
        self._offloaded: dict[str, torch.nn.Module] = {}
        self._managed: dict[str, torch.nn.Module] = {}
        self._sharded: list[torch.nn.Module] = []

    def place(self, built: BuiltModel, stored: dict[str, tuple[Path, StoredTensor]]) -> None:
        """Gives a model its place in the pipeline and memory on this rank, or none where it is not needed."""
        attribute = next((name for name in ATTRIBUTES[built.model_name] if getattr(self._pipeline, name) is None), None)
        if attribute is None:
            raise ValueError(f"more than {len(ATTRIBUTES[built.model_name])} models are a {built.model_name}")
        alone = attribute in ENCODERS
        if alone and self._world.rank != 0:
            return
        module = built.module.eval().requires_grad_(False).to(dtype=self._dtype)
        on_host = self._stays_on_host(attribute)
        device = torch.device("cpu") if on_host else self._world.device
        if self._memory.strategy == "fsdp" and attribute in _BLOCKS and self._world.world_size > 1:
            blocks = list(module.get_submodule(_BLOCKS[attribute]).children())
            shard_blocks(blocks, self._world)
            self._sharded += blocks
        names = list(module.state_dict())
        allocated: Future[dict[str, Destination]] = Future()
        if on_host:
            # Managed layers come back to memory of their own: page-locked, they would have both.
            pins = self._world.device.type == "cuda" and not self._manages(attribute)
            gpu = self._world.device if pins else None
            allocate = partial(_allocate, module, self._dtype, device, pinned_for=gpu)
            self._hosted.append((allocated, allocate))
        else:
            allocated.set_result(_allocate(module, self._dtype, device))
        for name in names:
            path, tensor = stored[built.stored_names[name]]
            entry = self._wanted.setdefault((path, tensor.name), (tensor, not alone, []))
            entry[2].append((allocated, name))
        self._finish.append(lambda: self._settle(attribute, built.model_class, module, device))
        setattr(self._pipeline, attribute, module)

    def wanted(self) -> list[Wanted]:
        """All that is to be read; the shared ones are the same, and in the same order, on every rank.

        After the last `place`: while DiffSynth builds a model, every new parameter of the process is on meta.
        """
        self._aside.start()
        return [
            Wanted(path=path, stored=tensor, shared=shared, destinations=partial(_destinations, places))
            for (path, _), (tensor, shared, places) in self._wanted.items()
        ]

    def _allocate_hosted(self) -> None:
        for allocated, allocate in self._hosted:
            try:
                allocated.set_result(allocate())
            except Exception as error:  # noqa: BLE001  whoever waits for the memory raises it
                allocated.set_exception(error)

    def finish(self) -> FSDPModule | None:
        """After the weights are there: what a strategy does with whole models. Returns the root of sharded blocks."""
        self._aside.join()
        for step in self._finish:
            step()
        if self._managed:
            self._pipeline.load_models_to_device = ManagedModels(self._managed, self._world.device).load
        else:
            self._pipeline.load_models_to_device = OffloadedModels(self._offloaded, self._world.device).load
        return common_root(self._sharded, self._world) if self._sharded else None

    def _stays_on_host(self, attribute: str) -> bool:
        return self._manages(attribute) or (attribute in ENCODERS and self._memory.offloads_encoders)

    def _manages(self, attribute: str) -> bool:
        return self._memory.strategy == "vram_limit" and attribute in MANAGED

    def _settle(self, attribute: str, model_class: str, module: torch.nn.Module, device: torch.device) -> None:
        for buffer in module.buffers():  # those that are not in the file, computed when it was built
            if buffer.device != device:
                buffer.data = buffer.data.to(device)
        if device == self._world.device and not self._manages(attribute):
            return
        if self._memory.strategy == "vram_limit":
            limit = self._memory.vram_limit_gib if self._world.device.type == "cuda" else None
            model = manage_model(attribute, model_class, module, self._world.device, limit_gib=limit)
            setattr(self._pipeline, attribute, model)
            self._managed[attribute] = model
        elif attribute == "text_encoder":
            stream_blocks(module, self._world.device)
        else:
            self._offloaded[attribute] = module


# A tensor's memory: that of its module, which may still be being made, and the tensor's name there.
_Place = tuple[Future[dict[str, Destination]], str]


def _destinations(places: Sequence[_Place]) -> list[Destination]:
    return [allocated.result()[name] for allocated, name in places]


def _allocate(
    module: torch.nn.Module, dtype: torch.dtype, device: torch.device, *, pinned_for: torch.device | None = None
) -> dict[str, Destination]:
    """Memory for every tensor of the module's state, and where in it the stored elements go. `pinned_for`: the GPU that
    host memory is page-locked for."""
    destinations: dict[str, Destination] = {}
    state = module.state_dict()
    # As DiffSynth does, whatever the stored dtype is.
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if not isinstance(tensor, DTensor)}
    if pinned_for is not None:
        torch.cuda.set_device(pinned_for)  # this thread's
        whole = page_locked(shapes, dtype)
    else:
        whole = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    for name, tensor in state.items():
        if isinstance(tensor, DTensor):
            local, rows = local_part(tensor)
            row = math.prod(tensor.shape[1:])  # by its shape: an element of a sharded tensor is gathered first
            destinations[name] = Destination(flat=local.view(-1), first=rows.start * row)
        else:
            destinations[name] = Destination(flat=whole[name].view(-1))
    module.load_state_dict(whole, assign=True, strict=False)
    return destinations


def _complete(pipeline: WanVideoPipeline, files: ModelFiles, world: World) -> None:
    if pipeline.vae is not None:
        pipeline.height_division_factor = pipeline.width_division_factor = pipeline.vae.upsampling_factor * 2
    if world.rank != 0:
        return
    pipeline.tokenizer = HuggingfaceTokenizer(name=str(files.tokenizer), seq_len=512, clean="whitespace")
    if files.audio_processor is not None:
        pipeline.audio_processor = Wav2Vec2Processor.from_pretrained(str(files.audio_processor))
