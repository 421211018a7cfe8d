"""FlashAttention 3 by the name and call of its own package, for `parallel.kernels` and DiffSynth to find.

Owns loading the operators that xformers 0.0.34 brings built (against torch's stable interface, so for any torch from
2.10 on) from beside this file, where benchmarks/gpu/carry_flash3.sh puts them. FlashAttention's own wheels are not
on PyPI.
"""

import ctypes
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
ctypes.CDLL(str(_FOLDER / "libcudart.so.12"), mode=ctypes.RTLD_GLOBAL)  # what it was linked against
torch.ops.load_library(str(_FOLDER / "flash3.so"))


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_attn_probs: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q, k, v and the result are (batch, tokens, heads, head_dim); the log-sum-exp, float32, (batch, heads, tokens)."""
    out, lse = torch.ops.flash_attn_3.fwd(q, k, v, num_splits=1)[:2]
    return (out, lse) if return_attn_probs else out


def flash_attn_varlen_func(*_arguments: object, **_named: object) -> None:
    """xfuser imports it beside the other; nothing here calls it."""
    raise NotImplementedError
