"""Joining the other ranks: device, process groups, the control group's commands and the gathered outcomes.

Owns everything that exists once a process: the bound device, the default group (NCCL, or gloo on CPU) for tensors,
xfuser's groups (DiffSynth's Wan code asks xfuser for them), the gloo control group for commands, and the store for
outcomes and health. Leaves out which device that is (`parallel.device`), the model (`parallel.model`) and the
generation (`parallel.engine`).

With one rank there is no group, and every call here answers at once: the callers are the same.
"""

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import structlog
import torch
import torch.distributed as dist

from parallel import collectives
from parallel.device import pick_device
from parallel.groups import GroupTable, join_xfuser
from parallel.plan import Command, Outcome, decode_command, encode_command

log = structlog.get_logger("world")

# How long a peer may wait for the next command. Idle peers wait in gloo, never inside an NCCL collective: that
# would hold the GPU at 100 % and die of the NCCL watchdog after minutes of an empty queue.
IDLE_TIMEOUT = timedelta(days=365)
JOIN_TIMEOUT = timedelta(minutes=10)
TENSOR_TIMEOUT = timedelta(minutes=30)

# Up to this size a tensor is broadcast together with others: 16 MiB take about as long to copy on a GPU as one more
# NCCL call takes to start.
COALESCED_BYTES = 16 * 1024 * 1024

_COMMAND, _JSON = 0, 1


class OutcomesMissingError(Exception):
    """Raised when some rank did not report its outcome in time; `ranks` are those that did not."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"no outcome from rank(s) {', '.join(map(str, ranks))}")
        self.ranks = ranks


@dataclass(frozen=True, slots=True)
class Launch:
    """What torchrun says in the environment; a plain `python -m daemon` is a world of one."""

    rank: int
    local_rank: int
    world_size: int
    restart_count: int


def read_launch() -> Launch:
    """Reads torchrun's environment variables."""
    return Launch(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        restart_count=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


class World:
    """The ranks of one process group, seen from one of them. Built by `join`, ended by `leave`."""

    def __init__(self, launch: Launch, device: torch.device, store: dist.Store, control: Any) -> None:
        self.launch = launch
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.device = device
        self._control = control
        self.groups = GroupTable(
            world_size=launch.world_size,
            local_rank=launch.local_rank,
            backend="nccl" if device.type == "cuda" else "gloo",
            timeout=TENSOR_TIMEOUT,
        )
        self._outcomes = dist.PrefixStore("reeld/outcome", store)
        self._sequence = 0
        self._unheard: list[tuple[Any, torch.Tensor]] = []

    @property
    def memory_capacity_bytes(self) -> int | None:
        """What this rank's device has in all; None for a CPU, whose memory is not its own."""
        if self.device.type != "cuda":
            return None
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def broadcast_command(self, command: Command | None = None) -> Command:
        """Called by every rank. Rank 0 gives the command, the peers wait for it. Returns it on every rank.

        Raises RuntimeError (from gloo) when another rank is gone.
        """
        data = encode_command(command) if command is not None else b""
        self._sequence += 1
        kind, data = self._broadcast_message(_COMMAND, data)
        for work, _ in self._unheard:  # received by now: messages keep their order
            work.wait()
        self._unheard.clear()
        while kind != _COMMAND:  # what rank 0 still said of a job that this rank had already given up
            kind, data = self._broadcast_message(_COMMAND, b"")
        return decode_command(data)

    def broadcast_json(self, value: Any = None) -> Any:
        """Called by every rank. Returns rank 0's value, over gloo: small JSON, an object or a list.

        Raises RuntimeError when another rank is gone, or when rank 0 has gone on to another command.
        """
        kind, data = self._broadcast_message(_JSON, json.dumps(value).encode())
        if kind != _JSON:
            raise RuntimeError("rank 0 sent a command while this rank was still at the last one")
        return json.loads(data)

    def say_json(self, value: Any) -> None:
        """On rank 0 alone: what the peers, if they still wait in `broadcast_json`, are to get as its answer.

        Waits for nobody, where a broadcast would wait until each peer has received it: peers that failed as well have
        left, and hear it only on their way to the next command, which passes it over.
        """
        if self.world_size == 1:
            return
        data = json.dumps(value).encode()
        header = torch.tensor([_JSON, len(data)], dtype=torch.int64)
        for tensor in (header, torch.frombuffer(bytearray(data), dtype=torch.uint8)):
            work = dist.broadcast(tensor, src=0, group=self._control, async_op=True)
            self._unheard.append((work, tensor))

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Called by every rank, with contiguous tensors on its device, of the same shapes and dtypes on all.

        Afterwards they hold rank 0's bits on every rank. Small ones travel together, since each message has its
        latency; large ones on their own, since together they would be copied first.
        """
        if self.world_size == 1:
            return
        flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor.numel() > 0]
        small = [bytes_ for bytes_ in flat if bytes_.numel() <= COALESCED_BYTES]
        if small:
            together = torch.cat(small)
            collectives.broadcast(together, source=0)
            if self.rank != 0:
                for own, received in zip(small, together.split([bytes_.numel() for bytes_ in small]), strict=True):
                    own.copy_(received)
        for bytes_ in flat:
            if bytes_.numel() > COALESCED_BYTES:
                collectives.broadcast(bytes_, source=0)

    def broadcast_flag(self, flag: int = 0) -> int:
        """Called by every rank, at the same step. Returns rank 0's flag; a few bytes over gloo."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor([flag], dtype=torch.int64)
        dist.broadcast(tensor, src=0, group=self._control)
        return int(tensor.item())

    def all_true(self, flag: bool) -> bool:
        """Called by every rank. Whether `flag` is true on all of them; a few bytes over gloo."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor([int(flag)], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._control)
        return bool(tensor.item())

    def gather_numbers(self, number: int) -> list[int]:
        """Called by every rank, at the same step. Every rank's signed 64-bit number, by rank; over gloo."""
        if self.world_size == 1:
            return [number]
        numbers = torch.empty(self.world_size, dtype=torch.int64)
        dist.all_gather_into_tensor(numbers, torch.tensor([number], dtype=torch.int64), group=self._control)
        return [int(each) for each in numbers]

    def report_outcome(self, outcome: Outcome) -> None:
        """Tells the other ranks how this rank's part of the last command ended; waits for nobody."""
        self._outcomes.set(self._outcome_key(self.rank), outcome.to_json())

    def gather_outcomes(self, *, grace_seconds: float) -> list[Outcome]:
        """Waits until every rank has reported on the last command; by rank.

        Not a collective: a rank that is stuck or dead must not hold up the one that asks. Raises
        OutcomesMissingError after `grace_seconds`.
        """
        keys = [self._outcome_key(rank) for rank in range(self.world_size)]
        try:
            self._outcomes.wait(keys, timedelta(seconds=grace_seconds))
        except (RuntimeError, dist.DistError) as error:
            missing = [rank for rank, key in enumerate(keys) if not self._outcomes.check([key])]
            raise OutcomesMissingError(missing or list(range(self.world_size))) from error
        outcomes = [Outcome.from_json(self._outcomes.get(key)) for key in keys]
        if self.rank == 0 and self._sequence > 1:
            # Kept for one more command, so that no slower reader misses them, and then dropped: memory stays flat.
            for rank in range(self.world_size):
                self._outcomes.delete_key(f"{self._sequence - 1}/{rank}")
        return outcomes

    def reported_outcomes(self) -> list[Outcome]:
        """The outcomes of the last command that are there already; waits for nobody. For any thread."""
        keys = [self._outcome_key(rank) for rank in range(self.world_size)]
        return [Outcome.from_json(self._outcomes.get(key)) for key in keys if self._outcomes.check([key])]

    def leave(self) -> None:
        """Called by every rank, after the last command."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _broadcast_message(self, kind: int, data: bytes) -> tuple[int, bytes]:
        if self.world_size == 1:
            return kind, data
        header = torch.tensor([kind, len(data)], dtype=torch.int64)
        dist.broadcast(header, src=0, group=self._control)
        sent_kind, size = header.tolist()
        payload = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if self.rank == 0
            else torch.empty(size, dtype=torch.uint8)
        )
        dist.broadcast(payload, src=0, group=self._control)
        return sent_kind, payload.numpy().tobytes()

    def _outcome_key(self, rank: int) -> str:
        return f"{self._sequence}/{rank}"


class HealthBoard:
    """What every rank last said of itself, in the store; over a connection of its own, for the health threads."""

    def __init__(self, launch: Launch) -> None:
        self._world_size = launch.world_size
        self._rank = launch.rank
        self._lock = threading.Lock()
        store: dist.Store
        if launch.world_size == 1:
            store = dist.HashStore()
        else:
            # The ranks' main store may be held by a blocking wait of the main thread.
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=JOIN_TIMEOUT,
            )
        run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        self._store = dist.PrefixStore(f"reeld/health/{run}/{launch.restart_count}", store)

    def write(self, record: dict[str, Any]) -> None:
        """Says how this rank is. Raises RuntimeError when the store is gone."""
        with self._lock:
            self._store.set(str(self._rank), json.dumps(record))

    def read_all(self) -> list[dict[str, Any] | None]:
        """Every rank's last record, by rank; None for a rank that has not written yet."""
        records: list[dict[str, Any] | None] = []
        with self._lock:
            for rank in range(self._world_size):
                key = str(rank)
                records.append(json.loads(self._store.get(key)) if self._store.check([key]) else None)
        return records


def join(launch: Launch, *, device_kind: str) -> World:
    """Called by every rank. Binds the device first, then joins the groups.

    Raises ValueError when the device is not there, CudaForkedError when this process may not use it, RuntimeError when
    the other ranks do not come.
    """
    device = pick_device(device_kind, launch.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before any group or tensor exists
    if launch.world_size == 1:
        return World(launch, device, dist.HashStore(), None)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, world_size = next(dist.rendezvous("env://", launch.rank, launch.world_size))
    store.set_timeout(JOIN_TIMEOUT)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default", store),
        rank=rank,
        world_size=world_size,
        timeout=TENSOR_TIMEOUT,
    )
    control = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
    join_xfuser(rank=launch.rank, world_size=launch.world_size, local_rank=launch.local_rank, backend=backend)
    return World(launch, device, dist.PrefixStore(f"restart/{launch.restart_count}", store), control)
