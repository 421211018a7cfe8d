"""Gives a machine's torch before 2.13 what reeld takes from newer ones: python -m benchmarks.gpu.older_torch

Owns one method, written into that torch's own files: benchmarks measure on the torch that a GPU machine has, while
reeld itself is installed with a newer one. Does nothing where the method is there.
"""

from pathlib import Path

import torch.distributed.fsdp as fsdp
from torch.distributed.fsdp._fully_shard import _fully_shard

_ADDED = """

def _reset_iter_state(self):
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    state = self._get_fsdp_state()
    current = torch.accelerator.current_stream() if torch.accelerator.is_available() else None
    for context_state in state._state_ctx.all_states:
        context_state._training_state = TrainingState.IDLE
        group = context_state._fsdp_param_group
        if group is None:
            continue
        result, group._all_gather_result = group._all_gather_result, None
        if result is not None and result.all_gather_event is not None and current is not None:
            current.wait_event(result.all_gather_event)
        if result is not None and result.all_gather_work is not None:
            result.all_gather_work.wait()
        group._post_forward_indices.clear()
        group._training_state = TrainingState.IDLE
        group._to_sharded()
    state._comm_ctx.all_gather_state = None
    state._comm_ctx.post_forward_order.clear()
    state._state_ctx.iter_forward_root = None


FSDPModule.reset_iter_state = _reset_iter_state
"""


if __name__ == "__main__" and not hasattr(fsdp.FSDPModule, "reset_iter_state"):
    with Path(_fully_shard.__file__).open("a") as file:
        file.write(_ADDED)
