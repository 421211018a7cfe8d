"""Self-attention over a sequence that is spread over the ranks: Ulysses, a ring, or both.

Every rank holds a slice of the tokens. One fused all-to-all trades token slices for head slices of q, k and v
(DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509), so that each Ulysses group holds a block of the sequence with
all its tokens. Where the ring degree is above one, keys and values travel round the ring and the partial results are
merged by their log-sum-exp (https://arxiv.org/abs/2310.01889); the next block travels while this one is attended. A
second all-to-all trades heads back for tokens. The last slice is padded to the length of the others; the padding is
cut off before anything is attended. Leaves out projections and RoPE (`parallel.forward`) and the kernels themselves
(`parallel.kernels`).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel import collectives
from parallel.groups import SplitGroups, all_gather
from parallel.kernels import choose_kernel


@dataclass(frozen=True, slots=True)
class Sequence:
    """How one branch's tokens lie on the ranks: `num_tokens` in slices of `slice_tokens`, the last ones padded."""

    groups: SplitGroups
    num_tokens: int

    @property
    def slice_tokens(self) -> int:
        return -(-self.num_tokens // self.groups.sequence.size)

    @property
    def begin(self) -> int:
        """The number of this rank's first token; behind the last one where this rank has padding only."""
        return self.groups.sequence.rank * self.slice_tokens

    @property
    def own_tokens(self) -> int:
        """How many of this rank's slice are tokens, not padding."""
        return max(0, min(self.slice_tokens, self.num_tokens - self.begin))

    def own(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's slice of (batch, num_tokens, ...), padded with zeros to (batch, slice_tokens, ...)."""
        own = tokens[:, self.begin : self.begin + self.own_tokens]
        if self.own_tokens == self.num_tokens:
            return own
        if self.own_tokens == self.slice_tokens:
            return own.clone()  # a view would keep the whole alive
        padding = own.new_zeros((own.shape[0], self.slice_tokens - self.own_tokens, *own.shape[2:]))
        return torch.cat((own, padding), dim=1)

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """The inverse of `own`: every rank's (1, slice_tokens, n) as (1, num_tokens, n), without the padding.

        Called by every rank of the sequence group.
        """
        gathered = all_gather(own.transpose(0, 1), self.groups.sequence).flatten(0, 1).transpose(0, 1)
        return gathered[:, : self.num_tokens]

    def attend_alone(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What `attend` does where one rank has all tokens, without packing: q, k, v (tokens, batch, heads, head_dim).

        Returns (1, tokens, batch, heads, head_dim).
        """
        kernel = choose_kernel(q.device, q.dtype, q.shape[-1])
        return kernel.attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1).unsqueeze(0)

    def attend(self, packed: torch.Tensor) -> torch.Tensor:
        """Attention of this rank's tokens over the whole sequence. Called by every rank of the sequence group.

        packed: (ulysses_degree, slice_tokens, batch, 3, heads / ulysses_degree, head_dim): q, k and v of this rank's
        tokens, in the groups of heads that go to each Ulysses rank. Returns (ulysses_degree, slice_tokens, batch,
        heads / ulysses_degree, head_dim): the result for this rank's tokens, in the same groups of heads.
        """
        block = _all_to_all(packed, self.groups).flatten(0, 1)
        if self.groups.ring.size == 1:
            # (tokens, batch, 3, heads, head_dim); the padding is at the end, and is not attended.
            q, k, v = (block[: self.num_tokens, :, index].transpose(0, 1) for index in range(3))
            attended = choose_kernel(q.device, q.dtype, q.shape[-1]).attend(q, k, v)
        else:
            attended = self._ring(block)
        attended = attended.transpose(0, 1)
        padding = block.shape[0] - attended.shape[0]
        if padding:
            attended = torch.cat((attended, attended.new_zeros((padding, *attended.shape[1:]))))
        ulysses = self.groups.ulysses.size
        return _all_to_all(attended.reshape(ulysses, self.slice_tokens, *attended.shape[1:]), self.groups)

    def _ring(self, block: torch.Tensor) -> torch.Tensor:
        """Attention of this Ulysses group's block over all blocks: (batch, own block's tokens, heads, head_dim)."""
        ring = self.groups.ring
        kernel = choose_kernel(block.device, block.dtype, block.shape[-1])
        block_tokens = block.shape[0]
        valid = [max(0, min(block_tokens, self.num_tokens - index * block_tokens)) for index in range(ring.size)]
        q = block[: valid[ring.rank], :, 0].transpose(0, 1)
        travelling = block[:, :, 1:].contiguous()
        out: torch.Tensor | None = None
        lse: torch.Tensor | None = None
        for hop in range(ring.size):
            arriving, requests = None, []
            if hop + 1 < ring.size:
                arriving = torch.empty_like(travelling)
                requests = _pass_on(travelling, arriving, self.groups)
            tokens = valid[(ring.rank - hop) % ring.size]
            if tokens and q.shape[1]:
                k, v = (travelling[:tokens, :, index].transpose(0, 1) for index in range(2))
                out, lse = _merge(out, lse, *kernel.attend_with_lse(q, k, v))
            for request in requests:
                request.wait()
            if arriving is not None:
                travelling = arriving
        return q.new_empty(q.shape) if out is None else out.to(block.dtype)


def _merge(
    out: torch.Tensor | None, lse: torch.Tensor | None, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins the results over two sets of keys, in float32: each weighs what its scores sum up to."""
    part = part.float()
    if out is None or lse is None:
        return part, part_lse
    joint = torch.logaddexp(lse, part_lse)
    return out * (lse - joint).exp().unsqueeze(-1) + part * (part_lse - joint).exp().unsqueeze(-1), joint


def _all_to_all(packed: torch.Tensor, groups: SplitGroups) -> torch.Tensor:
    if groups.ulysses.handle is None:
        return packed
    received = torch.empty_like(packed, memory_format=torch.contiguous_format)
    collectives.all_to_all_single(received, packed.contiguous(), group=groups.ulysses.handle)
    return received


def _pass_on(travelling: torch.Tensor, arriving: torch.Tensor, groups: SplitGroups) -> list[dist.Work]:
    ring = groups.ring
    following = dist.get_global_rank(ring.handle, (ring.rank + 1) % ring.size)
    preceding = dist.get_global_rank(ring.handle, (ring.rank - 1) % ring.size)
    return collectives.isend_irecv(
        [
            dist.P2POp(dist.isend, travelling, following, ring.handle),
            dist.P2POp(dist.irecv, arriving, preceding, ring.handle),
        ]
    )
