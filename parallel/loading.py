"""Reading weights: every byte once from the disk, whatever the number of ranks.

Owns cutting the files into blocks, reading them ahead on threads of their own, and spreading them: of the blocks that
every rank needs, each rank reads its part and broadcasts it; what a rank needs alone it reads alone. The bytes travel
as they are stored and are converted on the device, straight into memory that is already the model's, so that loading
needs the model and a few blocks. What a rank reads for itself and keeps on the host as it is stored is read to where it
stays. Leaves out which tensors go where (`model.py`).
"""

import itertools
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
IOV_MAX = os.sysconf("SC_IOV_MAX")
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

    @property
    def size(self) -> int:
        return self.end - self.begin

    def part_of(self, stored: StoredTensor) -> tuple[int, int]:
        """Where what it holds of one of its tensors begins and ends in the file."""
        return max(self.begin, stored.begin), min(self.end, stored.end)


def load_tensors(wanted: Sequence[Wanted], world: World, *, progress: Progress = lambda _done, _total: None) -> None:
    """Called by every rank, with the same shared tensors in the same order on all. Fills every destination.

    Raises ReadError on the rank whose read failed; the others then wait until the group is ended.
    """
    shared = list(_blocks([each for each in wanted if each.shared]))
    blocks = [*shared, *_blocks([each for each in wanted if not each.shared])]
    num_sent = len(shared) if world.world_size > 1 else 0
    total = sum(block.size for block in blocks)
    done = 0
    sent, kept = blocks[:num_sent], blocks[num_sent:]
    with _Reader(sent[world.rank :: world.world_size], kept, world.device) as reader:
        # One block is in use while the next one travels.
        buffers = [torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=world.device) for _ in range(2)]
        for number, block in enumerate(blocks):
            owner = number % world.world_size if number < num_sent else world.rank
            bytes_ = reader.take(buffers[number % 2]) if owner == world.rank else buffers[number % 2][: block.size]
            if bytes_ is not None:  # not yet where they stay
                if number < num_sent:
                    collectives.broadcast(bytes_, source=owner)
                _scatter(block, bytes_)
            if owner == world.rank:
                reader.go_on()
            done += block.size
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
        begin, end = block.part_of(each.stored)
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


def _in_place(block: _Block) -> list[memoryview] | None:
    """Where the block's bytes stay on the host, in their order; None where they must be converted, split or moved."""
    found: list[memoryview] = []
    for each in block.tensors:
        destinations = each.destinations()
        if len(destinations) != 1:
            return None
        flat, dtype = destinations[0].flat, DTYPES[each.stored.dtype]
        size = each.stored.end - each.stored.begin
        if flat.device.type != "cpu" or flat.dtype != dtype or flat.nbytes != size:
            return None
        begin, end = block.part_of(each.stored)
        found.append(_bytes_of(flat)[begin - each.stored.begin : end - each.stored.begin])
    return found


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().data)


class _Reader:
    """Reads this rank's blocks ahead, in their order, a few at a time, into host memory that is used again."""

    def __init__(self, sent: Sequence[_Block], kept: Sequence[_Block], device: torch.device) -> None:
        """`sent`: those that other ranks wait for; then come `kept`, which may be read to where they stay."""
        self._blocks = iter([*((block, False) for block in sent), *((block, True) for block in kept)])
        self._pinned = device.type == "cuda"
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._files: dict[Path, int] = {}
        self._reads: deque[tuple[_Block, torch.Tensor, Future[bool]]] = deque()
        self._copied: torch.cuda.Event | None = None
        for _ in range(min(READ_AHEAD, len(sent) + len(kept))):
            self._begin(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._pinned), None)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_error: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)

    def take(self, on_device: torch.Tensor) -> torch.Tensor | None:
        """The next block on the device: copied into `on_device`, or, on a CPU, where it was read. Until `go_on`.

        None when its bytes are where they stay.
        """
        block, buffer, read = self._reads[0]
        self._copied = None
        if read.result():
            return None
        bytes_ = buffer[: block.size]
        if not self._pinned:
            return bytes_
        on_device[: block.size].copy_(bytes_, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return on_device[: block.size]

    def go_on(self) -> None:
        """The block that was taken is not needed any more: its memory is for another one."""
        _, buffer, _ = self._reads.popleft()
        self._begin(buffer, self._copied)

    def _begin(self, buffer: torch.Tensor, free: torch.cuda.Event | None) -> None:
        block, is_kept = next(self._blocks, (None, False))
        if block is None:
            return
        if block.path not in self._files:
            self._files[block.path] = _open(block.path)
        read = self._threads.submit(_read, block, is_kept, self._files[block.path], buffer, free)
        self._reads.append((block, buffer, read))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror})") from error


def _read(block: _Block, is_kept: bool, descriptor: int, buffer: torch.Tensor, free: "torch.cuda.Event | None") -> bool:
    """Whether it was read to where it stays, not into the buffer."""
    places = _in_place(block) if is_kept else None
    if free is not None:
        free.synchronize()  # the copy to the device out of this buffer
    _fill(places or [_bytes_of(buffer)[: block.size]], descriptor, block)
    return places is not None


def _fill(places: list[memoryview], descriptor: int, block: _Block) -> None:
    position = block.begin
    left = deque(places)
    while left:
        try:
            count = os.preadv(descriptor, [*itertools.islice(left, IOV_MAX)], position)
        except OSError as error:
            raise ReadError(f"{block.path}: cannot be read ({error.strerror})") from error
        if count == 0:
            raise ReadError(f"{block.path}: ends early; it was changed while it was read")
        position += count
        while left and count >= len(left[0]):
            count -= len(left.popleft())
        if count:
            left[0] = left[0][count:]


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
