"""The layout of a checkpoint: the names and shapes of its tensors, as its safetensors headers give them.

Owns reading a header, the check that the bytes it speaks of are there, and DiffSynth's hash of a layout. Pure
Python: neither torch nor the safetensors library is needed to look at a folder. Leaves out which layout is
the right one (`profile.py`) and the tensors themselves.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Shape = tuple[int, ...]
Layout = dict[str, Shape]

# The limit of the safetensors library itself; a larger length means that the file is something else.
_HEADER_LIMIT_BYTES = 100_000_000
# Bytes an element: `Dtype` in https://github.com/huggingface/safetensors, without the sub-byte formats, which
# no Wan checkpoint uses.
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: the bytes `begin` to `end` of its file. `dtype` is the format's own name, like BF16."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


class LayoutError(Exception):
    """Raised when a file is not a whole safetensors file; one line that names it and says what to do."""


def hash_layout(layout: Mapping[str, Shape]) -> str:
    """DiffSynth's hash of a checkpoint: md5 over its sorted tensor names, each with and without its shape.

    The same value as `diffsynth.core.loader.file.hash_model_file` (2.1.12), without torch.
    """
    words = [word for name, shape in layout.items() for word in (f"{name}:{'_'.join(map(str, shape))}", name)]
    return hashlib.md5(",".join(sorted(words)).encode(), usedforsecurity=False).hexdigest()


def read_layout(path: Path) -> Layout:
    """Names and shapes of the tensors of a safetensors file; raises what `read_tensors` raises."""
    return {tensor.name: tensor.shape for tensor in read_tensors(path)}


def read_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file in the header's order, after checking that all their bytes are there.

    The format: https://huggingface.co/docs/safetensors/index#format. Raises `LayoutError`, or `OSError` for a
    file that cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        # The length is checked before it is read: in another kind of file these bytes can mean exabytes.
        if size < 8 or not 2 <= header_bytes <= _HEADER_LIMIT_BYTES:
            raise LayoutError(f"{path}: not a safetensors file; reeld loads safetensors only")
        if size < 8 + header_bytes:
            raise LayoutError(f"{path}: truncated within its header; copy or download it again")
        raw = file.read(header_bytes)
    try:
        tensors = list(_header_tensors(json.loads(raw)))
        data_bytes = _data_bytes(tensors)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LayoutError(f"{path}: not a safetensors file; reeld loads safetensors only") from error
    expected = 8 + header_bytes + data_bytes
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise LayoutError(f"{path}: {fault}, {size} bytes instead of {expected}; copy or download it again")
    return [
        StoredTensor(t.name, t.dtype, t.shape, 8 + header_bytes + t.begin, 8 + header_bytes + t.end) for t in tensors
    ]


def _header_tensors(header: dict[str, dict[str, object]]) -> Iterator[StoredTensor]:
    """Each tensor, with offsets that count from the header's end; a malformed header raises some built-in error."""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = tuple(_count(n) for n in _list(entry["shape"]))
        begin, end = (_count(n) for n in _list(entry["data_offsets"]))
        if end - begin != math.prod(shape) * _DTYPE_BYTES[str(entry["dtype"])]:
            raise ValueError(f"{name}: the bytes do not fit the shape")
        yield StoredTensor(name, str(entry["dtype"]), shape, begin, end)


def _data_bytes(tensors: list[StoredTensor]) -> int:
    """Where the data ends; the tensors must lie side by side, without holes."""
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise ValueError(f"{tensor.name}: does not begin where the tensor before it ends")
        position = tensor.end
    return position


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError("not a count")
    return value
