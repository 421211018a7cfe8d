"""Faults inside a rank, told from outside: Python imports this module at start when its folder is on PYTHONPATH.

The product knows nothing of it. FAULTS_FILE names a JSON list of faults, read again at each of the model's steps, so
that one worker can serve many tests:

    {"id": "a", "rank": 1, "job_id": "...", "module": "DiTBlock", "step": 2, "action": "hang", "times": 1}

`module` is the class of one of DiffSynth's modules and `step` the number of its forward to act before, from 0: of
DiTBlock's, the denoising step (both branches of a step have its time embedding); of others', the call. "isend_irecv"
for a module: just after transfers between neighbours have begun, before they are waited for. `rank` null: every rank.
`times` null: always; else as often, over all restarts: each time leaves a mark beside the file. Actions:

    die        SIGKILL to this process                 raise      RuntimeError
    hang       sleeps for ever, in Python              oom        torch.OutOfMemoryError
    hang_in_c  waits for ever in C, holding the GIL    stop       SIGSTOP to this process
    sleep_in_c  as hang_in_c, but the first signal ends it
"""

import ctypes
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_FOR_EVER = 1_000_000


class _Faults:
    """Counts the forwards of the current job, and acts before those that the file names."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._attempt: Any = None
        self._counts: dict[str, int] = {}
        self._first: dict[str, Any] = {}
        self._embedding: float | None = None

    def before_forward(self, module: Any, arguments: Any) -> None:
        name = type(module).__name__
        if name not in ("DiTBlock", "WanTextEncoder", "Encoder3d", "Decoder3d"):
            return
        import structlog

        context = structlog.contextvars.get_contextvars()
        job_id = context.get("job_id")
        if self._first.setdefault(name, module) is not module and name == "DiTBlock":
            return  # another block of the same step
        attempt = (job_id, context.get("attempt"))
        if self._attempt != attempt or name == "WanTextEncoder":
            self._attempt, self._counts["DiTBlock"], self._embedding = attempt, -1, None
        if name == "DiTBlock":
            # reeld's own forward hands the time embedding to its blocks in a dataclass, DiffSynth's as a tensor.
            embedding = float(getattr(arguments[2], "projected", arguments[2]).double().sum())
            if embedding == self._embedding:
                return  # the other branch of the same step
            self._embedding = embedding
        self._counts[name] = self._counts.get(name, -1) + 1
        self._meet(name, job_id)

    def after_isend_irecv(self, begin: Callable[..., Any], operations: list[Any]) -> Any:
        import structlog

        begun = begin(operations)
        self._meet("isend_irecv", structlog.contextvars.get_contextvars().get("job_id"))
        return begun

    def _meet(self, name: str, job_id: Any) -> None:
        for fault in json.loads(self._path.read_text()):
            if (
                fault.get("module", "DiTBlock") == name
                and fault["job_id"] == job_id
                and fault.get("rank") in (None, _rank())
                and (name != "DiTBlock" or fault.get("step", 0) == self._counts[name])
                and self._left(fault)
            ):
                _act(fault["action"])

    def _left(self, fault: dict[str, Any]) -> bool:
        times = fault.get("times", 1)
        for number in range(_FOR_EVER if times is None else times):
            mark = self._path.with_name(f"{fault['id']}-rank-{_rank()}-{number}.fired")
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False


def _rank() -> int:
    """Asked late: a rank is forked with the model's code imported, and told its rank then."""
    return int(os.environ["RANK"])


def _act(action: str) -> None:
    import torch

    match action:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(_FOR_EVER)
        case "hang_in_c":
            mutex = ctypes.create_string_buffer(64)  # a pthread_mutex_t; a sleep would end with the first signal
            for _ in range(2):
                ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        case "sleep_in_c":
            ctypes.PyDLL(None).sleep(_FOR_EVER)
        case "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (told by a test)")
        case "raise":
            raise RuntimeError("told by a test")
        case _:
            raise ValueError(action)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Puts the hook in once DiffSynth's DiT is imported; torch is then as well."""

    name = "diffsynth.models.wan_video_dit"

    def __init__(self, faults: _Faults) -> None:
        self._faults = faults

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        import torch.distributed
        from torch.nn.modules.module import register_module_forward_pre_hook

        register_module_forward_pre_hook(self._faults.before_forward)
        begin = torch.distributed.batch_isend_irecv
        torch.distributed.batch_isend_irecv = functools.partial(self._faults.after_isend_irecv, begin)
        return spec


if "FAULTS_FILE" in os.environ:
    sys.meta_path.insert(0, _AfterImport(_Faults(Path(os.environ["FAULTS_FILE"]))))
