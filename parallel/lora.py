"""LoRAs in the weights of a loaded model: put in for a job, and taken out exactly.

A LoRA is added into the weights (`w + strength * alpha / rank * up @ down`, in float32, rounded once), so that a job
with LoRAs runs as fast as one without. Taking it out puts the original bits back: they are kept in host memory, each
rank a part of every weight (its own shard where the weights are sharded), so N ranks keep one copy. LoRAs stay in
until a job asks for others. Layers under DiffSynth's VRAM management are not written to; DiffSynth's own hot-loading
adds the product to their output.

Leaves out which layers a file is for (`lora_layout.py`) and what a publisher may ask for (`daemon.loras`).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffsynth.core.vram.layers import AutoWrappedLinear
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel import collectives
from parallel.layouts import LayoutError, read_layout
from parallel.lora_layout import TARGETS, LayerShapes, LoraError, match_lora
from parallel.outcome import PreparationError, outcome_of
from parallel.plan import LoraPlan
from parallel.world import World

DEFAULT_CACHE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class _Factors:
    """One layer's part of a LoRA on the host: `up` (out, rank), `down` (rank, in) and a number or None."""

    up: torch.Tensor
    down: torch.Tensor
    alpha: float | None

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def product(self, strength: float, rows: slice, device: torch.device) -> torch.Tensor:
        """`strength * up[rows] @ down` with alpha in it, float32; the order of DiffSynth's own fusing."""
        down = self.down.to(device=device, dtype=torch.float32)
        if self.alpha is not None:
            down = down * (self.alpha / down.shape[0])
        return strength * (self.up[rows].to(device=device, dtype=torch.float32) @ down)


# layer -> factors, of one file for one DiT
_Lora = dict[str, _Factors]


class LoraWeights:
    """The LoRAs of one model on one rank. Built once a model; `set` is called by every rank before a job."""

    def __init__(
        self, dits: Mapping[str, torch.nn.Module], world: World, *, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        """`dits`: the DiTs by DiffSynth's names, `dit` and `dit2`."""
        self._world = world
        self._layers = {name: _linear_layers(dit) for name, dit in dits.items()}
        self._cache = _LoraCache(cache_bytes)
        self._originals: dict[tuple[str, str], torch.Tensor] = {}
        self._changed: set[tuple[str, str]] = set()
        self._applied: tuple[LoraPlan, ...] | None = ()

    @property
    def shapes(self) -> dict[str, LayerShapes]:
        """(out, in) of every linear layer, by DiT and name."""
        return {
            dit: {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
            for dit, layers in self._layers.items()
        }

    @property
    def applied(self) -> tuple[LoraPlan, ...] | None:
        """What is in the weights now; None after a failure that could not be taken back."""
        return self._applied

    @torch.no_grad()
    def set(self, loras: Sequence[LoraPlan]) -> None:
        """Called by every rank. Makes the weights the original ones with exactly `loras` in them.

        Raises LoraError on every rank alike when a file cannot be used; the weights are then the original ones.
        Whatever else rank 0 meets while reading is raised there, and PreparationError on the others.
        Raises MemoryError or OutOfMemoryError on the rank that had too little, and RuntimeError on the others.
        """
        wanted = tuple(loras)
        if wanted == self._applied:
            return
        self._applied = None
        parts = self._fetch(wanted)
        error = self._rewrite(parts)
        if not self._world.all_true(error is None):
            self._rewrite({})  # writes originals into memory that is there
            self._applied = ()
            raise error or RuntimeError("another rank could not apply the LoRAs")
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)  # blocks are gathered in streams that do not wait for this one
        self._applied = wanted

    def _fetch(self, wanted: Sequence[LoraPlan]) -> dict[tuple[str, str], list[tuple[float, _Factors]]]:
        """The factors of every layer that is to change, in the order of `wanted`."""
        parts: dict[tuple[str, str], list[tuple[float, _Factors]]] = {}
        for lora in wanted:
            for dit in TARGETS[lora.target]:
                if dit in self._layers:
                    for layer, factors in self._read(lora, dit).items():
                        parts.setdefault((dit, layer), []).append((lora.strength, factors))
        return parts

    def _read(self, lora: LoraPlan, dit: str) -> _Lora:
        key = (lora.path, lora.version, dit)
        cached = self._cache.get(key)
        # Asked of all ranks: a rank that failed in between may have another cache.
        if self._world.all_true(cached is not None) and cached is not None:
            return cached
        read: _Lora | None = None
        failed: Exception | None = None
        head: dict[str, Any] = {}
        if self._world.rank == 0:
            try:
                read = _read_file(Path(lora.path), self.shapes[dit])
            except (LoraError, LayoutError, OSError, SafetensorError) as error:
                head = {"error": f"{lora.name}: {error}"}
            except Exception as error:  # noqa: BLE001  the others wait, whatever it was: memory that ran out, most likely
                failed, outcome = error, outcome_of(error, self._world.rank)
                head = {"failed": outcome.code, "message": outcome.message}
            else:
                head = {"layers": {name: _describe(factors) for name, factors in read.items()}}
        head = self._world.broadcast_json(head)
        if "layers" not in head:
            self._rewrite({})
            self._applied = ()
            if "failed" in head:
                raise failed or PreparationError(head["failed"], head["message"])
            raise LoraError(head["error"])
        received = self._broadcast(read, head["layers"])
        self._cache.put(key, received)
        return received

    def _broadcast(self, read: _Lora | None, layers: dict[str, Any]) -> _Lora:
        """Called by every rank. Rank 0's factors on every rank, in host memory."""
        if self._world.world_size == 1 and read is not None:
            return read
        received: _Lora = {}
        for name, (up_shape, down_shape, dtype, alpha) in layers.items():
            if read is not None:
                pair = [read[name].up.to(self._world.device), read[name].down.to(self._world.device)]
            else:
                kind = getattr(torch, dtype)
                pair = [torch.empty(shape, dtype=kind, device=self._world.device) for shape in (up_shape, down_shape)]
            self._world.broadcast_tensors(pair)
            received[name] = _Factors(up=pair[0].cpu(), down=pair[1].cpu(), alpha=alpha)
        return received

    def _rewrite(self, parts: Mapping[tuple[str, str], list[tuple[float, _Factors]]]) -> Exception | None:
        """Called by every rank. Every changed weight becomes its original, and those in `parts` get their LoRAs.

        An error of this rank is returned, not raised, and its later layers stay original: the other ranks go on with
        the collectives, and this one must take part in them.
        """
        failed: Exception | None = None
        for key in sorted(self._changed | parts.keys()):
            layer = self._layers[key[0]][key[1]]
            if isinstance(layer, AutoWrappedLinear):
                failed = _hot_load(layer, parts.get(key, ()), self._world.device) or failed
                self._changed = self._changed | {key} if key in parts else self._changed - {key}
                continue
            weight = layer.weight.data
            local, rows = local_part(weight)
            # A sharded weight differs from rank to rank; a whole one is the same on all, so each keeps a part of it.
            whole = not isinstance(weight, DTensor)
            share = _Share(self._world.rank, self._world.world_size) if whole else _Share(0, 1)
            if key in self._changed:
                share.put_back(local, self._originals[key])
                self._changed.discard(key)
            if key not in parts:
                continue
            if key not in self._originals:
                self._originals[key] = share.keep(local)
            self._changed.add(key)  # on every rank, failed or not, because putting back is a collective
            try:
                if failed is None:
                    total = local.float()
                    for strength, factors in parts[key]:
                        total = total + factors.product(strength, rows, local.device)
                    local.copy_(total)
            except (MemoryError, RuntimeError) as error:  # OutOfMemoryError is a RuntimeError
                failed = error
        return failed


@dataclass(frozen=True, slots=True)
class _Share:
    """Which part of a whole weight this rank keeps."""

    rank: int
    num_shares: int

    def keep(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the bits, on the host, padded to equal lengths."""
        flat = whole.reshape(-1)
        length = -(-flat.numel() // self.num_shares)
        part = torch.zeros(length, dtype=whole.dtype)
        own = flat[self.rank * length : (self.rank + 1) * length]
        part[: own.numel()].copy_(own)
        return part

    def put_back(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Called by every rank that shares the weight. Writes the original bits of all parts into `whole`."""
        if self.num_shares == 1:
            whole.copy_(part.view(whole.shape))
            return
        gathered = torch.empty(self.num_shares * part.numel(), dtype=part.dtype, device=whole.device)
        collectives.all_gather_into_tensor(gathered, part.to(whole.device))
        whole.copy_(gathered[: whole.numel()].view(whole.shape))


class _LoraCache:
    """LoRAs in host memory, least recently used first out; never more than `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._entries: OrderedDict[tuple[str, str, str], _Lora] = OrderedDict()

    def get(self, key: tuple[str, str, str]) -> _Lora | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: tuple[str, str, str], lora: _Lora) -> None:
        self._entries[key] = lora
        self._entries.move_to_end(key)
        while self._entries and self.nbytes > self._limit:
            self._entries.popitem(last=False)

    @property
    def nbytes(self) -> int:
        return sum(factors.nbytes for lora in self._entries.values() for factors in lora.values())


def _linear_layers(dit: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    layers = {}
    for path, module in dit.named_modules():
        if isinstance(module, torch.nn.Linear):
            # DiffSynth's wrappers add `.module` to the path, and keep the layer's own name.
            layers[module.name if isinstance(module, AutoWrappedLinear) else path] = module
    return layers


def _read_file(path: Path, layers: LayerShapes) -> _Lora:
    match = match_lora(read_layout(path), layers)
    read: _Lora = {}
    with safe_open(path, framework="pt", device="cpu") as file:
        for layer, pair in match.pairs.items():
            up, down = file.get_tensor(pair.up), file.get_tensor(pair.down)
            if not (up.is_floating_point() and down.is_floating_point()):
                raise LoraError(f"{pair.up}: holds {up.dtype}, which are no weights")
            read[layer] = _Factors(
                up=up.contiguous(),
                down=down.to(up.dtype).contiguous(),
                alpha=None if pair.alpha is None else float(file.get_tensor(pair.alpha).float().item()),
            )
    return read


def _describe(factors: _Factors) -> list[Any]:
    dtype = str(factors.up.dtype).removeprefix("torch.")
    return [list(factors.up.shape), list(factors.down.shape), dtype, factors.alpha]


def local_part(weight: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """This rank's rows of a weight (all of them where it is whole), and which they are."""
    if not isinstance(weight, DTensor):
        return weight, slice(0, weight.shape[0])
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    local: torch.Tensor = weight.to_local()
    return local, slice(offset[0], offset[0] + shape[0])


def _hot_load(
    layer: AutoWrappedLinear, parts: Sequence[tuple[float, _Factors]], device: torch.device
) -> Exception | None:
    layer.lora_A_weights.clear()
    layer.lora_B_weights.clear()
    try:
        for strength, factors in parts:
            scale = strength if factors.alpha is None else strength * factors.alpha / factors.down.shape[0]
            layer.lora_A_weights.append((factors.down.float() * scale).to(device, layer.computation_dtype))
            layer.lora_B_weights.append(factors.up.to(device, layer.computation_dtype))
    except (MemoryError, RuntimeError) as error:
        return error
    return None
