"""Attention kernels: which one runs, chosen once a process and logged.

Owns the choice and one calling convention for all of them: q, k and v are (batch, tokens, heads, head_dim), with any
strides but a dense last dimension. Leaves out who attends to what (`parallel.attention`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import structlog
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

log = structlog.get_logger("attention")

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
AttendWithLse = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """One kernel.

    attend(q, k, v) -> (batch, query tokens, heads, head_dim).
    attend_with_lse(q, k, v) -> the same and the log-sum-exp of the scores, (batch, query tokens, heads) in float32,
    with which partial results over blocks of keys are merged.
    """

    name: str
    attend: Attend
    attend_with_lse: AttendWithLse


@cache
def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionKernel:
    """The best kernel that runs here, by trying them from the fastest; logged once."""
    refused: dict[str, str] = {}
    for kernel, refusal in try_kernels(device, dtype, head_dim):
        if refusal is not None:
            refused[kernel.name] = refusal
            continue
        log.info("attention_kernel", kernel=kernel.name, dtype=str(dtype), head_dim=head_dim, refused=refused)
        return kernel
    raise RuntimeError(f"no attention kernel for {dtype} on {device}: {refused}")


def try_kernels(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> Iterator[tuple[AttentionKernel, str | None]]:
    """Every kernel there might be, the fastest first, and why it does not run here; None: it does."""
    probe = torch.randn(1, 128, 2, head_dim, device=device, dtype=torch.float32).to(dtype)
    for kernel in _candidates(device, dtype):
        try:
            kernel.attend(probe, probe, probe)
            kernel.attend_with_lse(probe, probe, probe)
        except (ImportError, RuntimeError, TypeError, AttributeError) as error:
            yield kernel, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        else:
            yield kernel, None


def _candidates(device: torch.device, dtype: torch.dtype) -> list[AttentionKernel]:
    if device.type != "cuda":
        return [_CPU]
    if dtype in (torch.bfloat16, torch.float16):
        return [_FLASH_3, _CUDNN, _FLASH_2, _EFFICIENT]
    return [_EFFICIENT]


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    return attend


def _cpu_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    # The same operator as plain DiffSynth's on a CPU, called as it calls it.
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _cpu_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return out.transpose(1, 2), lse.transpose(1, 2).float()


def _flash2_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    result = torch.ops.aten._scaled_dot_product_flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return result[0].transpose(1, 2), result[1].transpose(1, 2)


def _cudnn_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True
    )
    # cuDNN gives (batch, heads, tokens, 1) or, in newer torch, (batch, heads, tokens).
    lse = result[1].reshape(q.shape[0], q.shape[2], q.shape[1])
    return result[0].transpose(1, 2), lse.transpose(1, 2)


def _efficient_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    result = torch.ops.aten._scaled_dot_product_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True
    )
    # Its lse is padded to a multiple of 32 tokens.
    return result[0].transpose(1, 2), result[1][:, :, : q.shape[1]].transpose(1, 2)


def _flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    import flash_attn_interface

    out = flash_attn_interface.flash_attn_func(q, k, v)
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _flash3_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import flash_attn_interface

    out, lse = flash_attn_interface.flash_attn_func(q, k, v, return_attn_probs=True)[:2]
    return out, lse.transpose(1, 2)


_CPU = AttentionKernel("sdpa", _cpu_attend, _cpu_lse)
_FLASH_3 = AttentionKernel("flash_attention_3", _flash3, _flash3_lse)
_CUDNN = AttentionKernel("cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), _cudnn_lse)
_FLASH_2 = AttentionKernel("flash_attention_2", _sdpa(SDPBackend.FLASH_ATTENTION), _flash2_lse)
_EFFICIENT = AttentionKernel("efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), _efficient_lse)
