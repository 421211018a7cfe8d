"""VACE's hints over this rank's slice of the tokens.

The equal of DiffSynth's `VaceWanModel.forward` (2.1.12) beside `parallel.forward`: VACE's blocks are transformer
blocks of their own over the tokens of the control video, and what each makes is added after one of the DiT's. They
run over the same slices, with the same exchange and rotation. (DiffSynth's own `usp_vace_forward` counts the padding
of the last slice as tokens, so that its context and its x are cut at different places when the sequence does not
divide.)
"""

import functools

import torch
from diffsynth.models.wan_video_vace import VaceWanAttentionBlock, VaceWanModel
from torch import Tensor

from parallel.attention import Sequence
from parallel.forward import BlockRunner, Modulation
from parallel.rope import RopeTable


def prepare_vace(vace: VaceWanModel, *, compile_blocks: bool) -> None:
    """Has `vace(...)` and its blocks run this module's forward."""
    runner = BlockRunner(compile_blocks=compile_blocks)
    vace.forward = functools.partial(make_hints, vace)
    for block in vace.vace_blocks:
        block.forward = functools.partial(_run_block, runner, block)


def make_hints(
    vace: VaceWanModel,
    x: Tensor,
    vace_context: Tensor,
    context: Tensor,
    modulation: Modulation,
    rope: RopeTable,
    sequence: Sequence,
) -> list[Tensor]:
    """One hint for each block of VACE, each in x's shape. Called by every rank of the sequence group.

    x: (1, slice_tokens, dim), before the DiT's first block; vace_context: (1, channels, frames, height, width), of as
    many tokens as the video has, or of fewer: then the rest counts as zeros, as in DiffSynth.
    """
    tokens = vace.vace_patch_embedding(vace_context).flatten(2).transpose(1, 2)
    missing = sequence.num_tokens - tokens.shape[1]
    if missing:
        tokens = torch.cat((tokens, tokens.new_zeros(tokens.shape[0], missing, tokens.shape[2])), dim=1)
    carried, hints = sequence.own(tokens), []
    del tokens  # of the whole sequence
    for block in vace.vace_blocks:
        carried, hint = block(carried, x, context, modulation, rope, sequence)
        hints.append(hint)
    return hints


def _run_block(
    runner: BlockRunner,
    block: VaceWanAttentionBlock,
    carried: Tensor,
    x: Tensor,
    context: Tensor,
    modulation: Modulation,
    rope: RopeTable,
    sequence: Sequence,
) -> tuple[Tensor, Tensor]:
    if block.block_id == 0:
        carried = block.before_proj(carried) + x
    carried = runner.run(block, carried, context, modulation, rope, sequence)
    return carried, block.after_proj(carried)
