"""Reading weights: every byte once from the disk, whatever the number of ranks.

Owns cutting the files into blocks, reading them ahead on threads of their own, and spreading them: of the blocks that
every rank needs, each rank reads its part and broadcasts it; what a rank needs alone it reads alone. The bytes travel
as they are stored and are converted on the device, straight into memory that is already the model's, so that loading
needs the model and a few blocks. Leaves out which tensors go where (`model.py`).
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from parallel import collectives
from parallel.layouts import StoredTensor
from parallel.world import World

# Large enough for a disk's and a network's full speed, small enough that a few of them cost no memory to speak of.
BLOCK_BYTES = 32 * 1024 * 1024
READ_THREADS = 4
READ_AHEAD = 6
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

# progress(done_bytes, total_bytes) of what this rank takes part in
Progress = Callable[[int, int], None]


class ReadError(Exception):
    """Raised when a file cannot be read to its end; one line that names it."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a stored tensor goes: its elements from `first` on fill `flat`, a flat tensor of any dtype and device."""

    flat: torch.Tensor
    first: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """One stored tensor and where it goes on this rank. `shared`: whether every rank wants it.

    `destinations` are asked for when its bytes have come, and may wait for memory that is still being made.
    """

    path: Path
    stored: StoredTensor
    shared: bool
    destinations: Callable[[], Sequence[Destination]] = tuple


@dataclass(frozen=True, slots=True)
class _Block:
    """Bytes of one file that are read and sent at once: the whole or parts of tensors that lie side by side."""

    path: Path
    begin: int
    end: int
    tensors: tuple[Wanted, ...] = field(repr=False)


def load_tensors(wanted: Sequence[Wanted], world: World, *, progress: Progress = lambda _done, _total: None) -> None:
    """Called by every rank, with the same shared tensors in the same order on all. Fills every destination.

    Raises ReadError on the rank whose read failed; the others then wait until the group is ended.
    """
    shared = list(_blocks([each for each in wanted if each.shared]))
    alone = list(_blocks([each for each in wanted if not each.shared]))
    total = sum(block.end - block.begin for block in (*shared, *alone))
    own = [block for number, block in enumerate(shared) if number % world.world_size == world.rank]
    done = 0
    with _Reader([*own, *alone], world.device) as reader:
        # One block is in use while the next one travels.
        buffers = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=world.device) for _ in range(2)]
        for number, block in enumerate([*shared, *alone]):
            size = block.end - block.begin
            is_shared = number < len(shared) and world.world_size > 1
            owner = number % world.world_size if is_shared else world.rank
            bytes_ = reader.take(buffers[number % 2]) if owner == world.rank else buffers[number % 2][:size]
            if is_shared:
                collectives.broadcast(bytes_, source=owner)
            _scatter(block, bytes_)
            if owner == world.rank:
                reader.go_on()
            done += size
            progress(done, total)


def _blocks(wanted: Sequence[Wanted]) -> Iterator[_Block]:
    """Cuts tensors into blocks; a tensor larger than a block spans several, small ones share one."""
    by_path: dict[Path, list[Wanted]] = {}
    for each in wanted:
        by_path.setdefault(each.path, []).append(each)
    for path, tensors in by_path.items():
        tensors.sort(key=lambda each: each.stored.begin)
        run: list[Wanted] = []
        for each in tensors:
            if run and each.stored.begin != run[-1].stored.end:  # what lies between is not wanted here
                yield from _cut(path, run)
                run = []
            run.append(each)
        yield from _cut(path, run)


def _cut(path: Path, run: list[Wanted]) -> Iterator[_Block]:
    position, last = run[0].stored.begin, run[-1].stored.end
    index = 0
    while position < last:
        end = min(position + BLOCK_BYTES, last)
        while run[index].stored.end <= position:
            index += 1
        stop = index
        while stop < len(run) and run[stop].stored.begin < end:
            stop += 1
        split = run[stop - 1].stored  # no element is cut in two
        end = end if end >= split.end else end - (end - split.begin) % DTYPES[split.dtype].itemsize
        yield _Block(path=path, begin=position, end=end, tensors=tuple(run[index:stop]))
        position = end


def _scatter(block: _Block, bytes_: torch.Tensor) -> None:
    for each in block.tensors:
        dtype = DTYPES[each.stored.dtype]
        begin, end = max(block.begin, each.stored.begin), min(block.end, each.stored.end)
        first = (begin - each.stored.begin) // dtype.itemsize
        piece = bytes_[begin - block.begin : end - block.begin]
        if piece.storage_offset() % dtype.itemsize:
            piece = piece.clone()  # a view as another dtype must be aligned; 8-bit tensors may come before it
        elements = piece.view(dtype)
        for destination in each.destinations():
            low = max(first, destination.first)
            high = min(first + elements.numel(), destination.first + destination.flat.numel())
            if low < high:
                destination.flat[low - destination.first : high - destination.first].copy_(
                    elements[low - first : high - first]
                )


class _Reader:
    """Reads blocks ahead, in their order, a few at a time, into host memory that is used again."""

    def __init__(self, blocks: Sequence[_Block], device: torch.device) -> None:
        self._blocks = iter(blocks)
        self._pinned = device.type == "cuda"
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._files: dict[Path, int] = {}
        self._reads: deque[Future[tuple[torch.Tensor, int]]] = deque()
        self._taken = torch.empty(0)
        self._copied: torch.cuda.Event | None = None
        for _ in range(min(READ_AHEAD, len(blocks))):
            self._begin(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._pinned), None)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_error: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)

    def take(self, on_device: torch.Tensor) -> torch.Tensor:
        """The next block on the device: copied into `on_device`, or, on a CPU, where it was read. Until `go_on`."""
        self._taken, size = self._reads.popleft().result()
        if not self._pinned:
            return self._taken[:size]
        on_device[:size].copy_(self._taken[:size], non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return on_device[:size]

    def go_on(self) -> None:
        """The block that was taken is not needed any more: its memory is for another one."""
        self._begin(self._taken, self._copied)

    def _begin(self, buffer: torch.Tensor, free: torch.cuda.Event | None) -> None:
        block = next(self._blocks, None)
        if block is None:
            return
        if block.path not in self._files:
            self._files[block.path] = _open(block.path)
        self._reads.append(self._threads.submit(_read, block, self._files[block.path], buffer, free))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror})") from error


def _read(
    block: _Block, descriptor: int, buffer: torch.Tensor, free: "torch.cuda.Event | None"
) -> tuple[torch.Tensor, int]:
    if free is not None:
        free.synchronize()  # the copy to the device out of this buffer
    size = block.end - block.begin
    view = memoryview(buffer.numpy().data)[:size]
    position = 0
    while position < size:
        try:
            count = os.preadv(descriptor, [view[position:]], block.begin + position)
        except OSError as error:
            raise ReadError(f"{block.path}: cannot be read ({error.strerror})") from error
        if count == 0:
            raise ReadError(f"{block.path}: ends early; it was changed while it was read")
        position += count
    return buffer, size


class Throttled:
    """Passes a progress on at most every `interval_seconds`, and the last one always."""

    def __init__(self, progress: Progress, *, interval_seconds: float) -> None:
        self._progress = progress
        self._interval = interval_seconds
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + self._interval
            self._progress(done, total)


def stored_by_name(files: Mapping[Path, Sequence[StoredTensor]]) -> dict[str, tuple[Path, StoredTensor]]:
    """All tensors of a part's files by their names."""
    return {tensor.name: (path, tensor) for path, tensors in files.items() for tensor in tensors}
