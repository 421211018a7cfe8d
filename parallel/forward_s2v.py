"""One forward of Wan 2.2's speech-to-video transformer over this rank's slice of the tokens.

The equal of DiffSynth's `model_fn_wans2v` (2.1.12): the video's tokens, with the pose's added, then those of the
reference image, which have timestep 0 and a rotation of their own; after some blocks each frame's tokens attend to that
frame's sound. DiffSynth refuses a sequence that does not divide by the ranks, and takes a slice's tokens for whole
frames when it adds the sound; here a slice may begin and end within a frame.

Leaves out the motion frames of a clip before (`motion_video`), which no job can bring, and the exchange
(`parallel.attention`).
"""

from typing import Any

import torch
from diffsynth.models.wan_video_dit import sinusoidal_embedding_1d
from diffsynth.models.wan_video_dit_s2v import WanS2VModel, rope_precompute
from torch import Tensor

from parallel.attention import Sequence
from parallel.forward import BranchMemory, Modulation, bind_forward, embed_context
from parallel.groups import SplitGroups
from parallel.rope import RopeTable, RopeTables


def prepare_s2v(dit: WanS2VModel, *, compile_blocks: bool) -> None:
    """Has `dit(...)` and its blocks run this module's forward."""
    bind_forward(dit, forward_slice_s2v, compile_blocks=compile_blocks)


def forward_slice_s2v(
    dit: WanS2VModel,
    *,
    latents: Tensor,
    timestep: Tensor,
    inputs: dict[str, Any],
    groups: SplitGroups,
    tables: RopeTables,
    memory: BranchMemory,
    vace: Any = None,
    motion_controller: Any = None,
    reuse_residual: bool = False,
    keep_residual: bool = False,
) -> Tensor:
    """Predicts the noise, as `parallel.forward.forward_slice` does; the first latent frame is the reference image.

    inputs: `context`, `audio_embeds` (1, layers, audio_dim, frames of the video - 1) and perhaps `s2v_pose_latents`.
    Raises ValueError for what has no forward here: motion frames, and a step cache.
    """
    if not inputs.get("drop_motion_frames", True) or reuse_residual or keep_residual:
        raise ValueError("speech-to-video has no parallel forward for motion_video, and no step cache")
    reference, video = latents[:, :, :1], latents[:, :, 1:]
    pose = inputs.get("s2v_pose_latents")
    embedded = dit.patch_embedding(video) + dit.cond_encoder(torch.zeros_like(video) if pose is None else pose)
    frames, height, width = embedded.shape[2:]
    tokens = torch.cat([_tokens(embedded), _tokens(dit.patch_embedding(reference))], dim=1)
    video_tokens = frames * height * width
    sequence = Sequence(groups, tokens.shape[1])
    of_reference = _of_reference(sequence, video_tokens, latents.device)
    x = sequence.own(tokens) + dit.trainable_cond_mask(of_reference.long()).to(tokens.dtype)
    rope = tables.kept(
        ("s2v", frames, height, width, groups.degrees, sequence.begin),
        lambda: _rope(dit, (frames, height, width), sequence, latents.device),
    )

    # Row 0 for the video's tokens, row 1, at timestep 0, for the reference's.
    turned = dit.time_embedding(
        sinusoidal_embedding_1d(dit.freq_dim, torch.cat((timestep, torch.zeros_like(timestep))))
    )
    projected = dit.time_projection(turned).unflatten(1, (6, dit.dim)).unsqueeze(0)
    modulation = Modulation(embedded=turned.unsqueeze(0), projected=projected, later=of_reference.unsqueeze(-1))
    context = embed_context(dit, inputs, memory)
    sound_global, sound = dit.cal_audio_emb(inputs["audio_embeds"])

    for index, block in enumerate(dit.blocks):
        x = block(x, context, modulation, rope, sequence)
        if index in dit.audio_injector.injected_block_id:
            place = dit.audio_injector.injected_block_id[index]
            x = _inject(dit, place, x, sound_global, sound, sequence, tokens_a_frame=height * width)
    predicted = dit.head(x, turned[:1])
    made = dit.unpatchify(sequence.whole(predicted)[:, :video_tokens], (frames, height, width))
    return torch.cat((reference, made), dim=2)


def _tokens(embedded: Tensor) -> Tensor:
    return embedded.flatten(2).transpose(1, 2)


def _of_reference(sequence: Sequence, video_tokens: int, device: torch.device) -> Tensor:
    """(1, slice_tokens): whether each of this rank's tokens is the reference image's. Padding counts as such."""
    number = torch.arange(sequence.begin, sequence.begin + sequence.slice_tokens, device=device)
    return (number >= video_tokens).unsqueeze(0)


def _rope(dit: WanS2VModel, grid: tuple[int, int, int], sequence: Sequence, device: torch.device) -> RopeTable:
    """This rank's rows of DiffSynth's own table, which puts the reference image 30 frames away from the video."""
    frames, height, width = grid
    shape = torch.empty(1, sequence.num_tokens, 1, dit.dim // dit.num_heads)
    sizes = dit.get_grid_sizes((frames, height, width), (1, height, width))
    turns = rope_precompute(shape, sizes, dit.freqs.cpu(), start=None)[0, :, 0]
    own = turns[sequence.begin : sequence.begin + sequence.own_tokens]
    return RopeTable.of(own, padded=sequence.slice_tokens, device=device)


def _inject(
    dit: WanS2VModel,
    place: int,
    x: Tensor,
    sound_global: Tensor,
    sound: Tensor,
    sequence: Sequence,
    *,
    tokens_a_frame: int,
) -> Tensor:
    """Adds to each of this rank's video tokens what it hears in its own frame; the reference's tokens hear nothing.

    The equal of `WanS2VModel.after_transformer_block`. x: (1, slice_tokens, dim); sound_global: (1, frames, 1, dim);
    sound: (1, frames, n, dim). The slice is filled up to whole frames, so that each frame is one row of a batch.
    """
    end = min(sequence.begin + sequence.own_tokens, sound.shape[1] * tokens_a_frame)
    own = max(0, end - sequence.begin)
    # A rank without a video token runs one frame of zeros, of which nothing is kept.
    first = sequence.begin // tokens_a_frame if own else 0
    last = (end - 1) // tokens_a_frame if own else 0
    before = sequence.begin - first * tokens_a_frame if own else 0
    filled = x.new_zeros(1, (last - first + 1) * tokens_a_frame, x.shape[2])
    filled[:, before : before + own] = x[:, :own]
    rows = filled.view(-1, tokens_a_frame, x.shape[2])
    injector = dit.audio_injector
    heard = injector.injector_adain_layers[place](rows, temb=sound_global[0, first : last + 1, 0])
    heard = injector.injector[place](heard, sound[0, first : last + 1])
    added = heard.reshape(1, -1, x.shape[2])[:, before : before + own]
    return torch.cat((x[:, :own] + added, x[:, own:]), dim=1)
