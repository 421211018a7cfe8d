"""How one generation is split over the ranks: CFG x Ulysses x ring, chosen for each job.

Owns the degrees, what makes them possible, and the cost model that picks among them. Pure arithmetic: imports no
torch, so that the command line can plan as well. Leaves out the process groups (`parallel.groups`) and what runs in
them (`parallel.attention`, `parallel.denoise`).
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelDegrees:
    """`cfg_degree` x `ulysses_degree` x `ring_degree` ranks work on one job.

    The two branches of classifier-free guidance run on `cfg_degree` halves of the ranks; each half spreads its tokens
    over `ulysses_degree` x `ring_degree` ranks.
    """

    cfg_degree: int = 1
    ulysses_degree: int = 1
    ring_degree: int = 1

    @property
    def world_size(self) -> int:
        return self.cfg_degree * self.ulysses_degree * self.ring_degree

    @property
    def sequence_degree(self) -> int:
        """Over how many ranks the tokens of one branch are spread."""
        return self.ulysses_degree * self.ring_degree


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedDegrees:
    """What the configuration fixes; None leaves a degree to the cost model."""

    cfg_degree: int | None = None
    ulysses_degree: int | None = None
    ring_degree: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DitShape:
    """The sizes of a diffusion transformer that decide what a split costs."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_tokens: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one rank can do, for the cost model.

    flops_per_second: of matrix products in the model's dtype, as they run in a transformer block.
    link_bytes_per_second: what one rank sends in a collective, one way.
    memory_bytes_per_second: reading or writing the device's memory.
    collective_seconds: the fixed cost of one collective: launch and synchronisation.
    """

    flops_per_second: float
    link_bytes_per_second: float
    memory_bytes_per_second: float
    collective_seconds: float
    element_bytes: int = 2


# What attention in pieces costs beside attention in one go, as a share of it: shorter kernels, each with a tail.
RING_OVERHEAD = 0.08

# Orders of magnitude, from an H100 SXM box with NVLink and from gloo over loopback: the choice between splits turns
# on the ratios, not on the last digit.
CUDA = Machine(
    flops_per_second=500e12, link_bytes_per_second=250e9, memory_bytes_per_second=2.5e12, collective_seconds=40e-6
)
CPU = Machine(
    flops_per_second=30e9,
    link_bytes_per_second=1e9,
    memory_bytes_per_second=10e9,
    collective_seconds=200e-6,
    element_bytes=4,
)


def check_degrees(degrees: ParallelDegrees, *, world_size: int, num_heads: int, guided: bool = True) -> None:
    """Raises ValueError, with every factor, when the degrees cannot work. `guided`: the job has a second branch."""
    factors = (
        f"cfg_degree {degrees.cfg_degree} x ulysses_degree {degrees.ulysses_degree} x ring_degree "
        f"{degrees.ring_degree} on world_size {world_size} with num_heads {num_heads}"
    )
    if min(degrees.cfg_degree, degrees.ulysses_degree, degrees.ring_degree) < 1:
        raise ValueError(f"{factors}: every degree is at least 1")
    if degrees.world_size != world_size:
        raise ValueError(f"{factors}: the product is {degrees.world_size}, not {world_size}")
    if degrees.cfg_degree > 2:
        raise ValueError(f"{factors}: guidance has 2 branches, so cfg_degree is 1 or 2")
    if num_heads % degrees.ulysses_degree:
        divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(f"{factors}: ulysses_degree must divide num_heads; it can be one of {divisors}")
    if degrees.cfg_degree == 2 and not guided:
        raise ValueError(f"{factors}: with cfg_scale 1 there is no second branch for cfg_degree 2")


def possible_degrees(
    *, world_size: int, num_heads: int, guided: bool, pinned: PinnedDegrees | None = None
) -> Iterator[ParallelDegrees]:
    """Every split that works, without those that a pin rules out."""
    pinned = pinned or PinnedDegrees()
    every = list(_every_split(world_size=world_size, num_heads=num_heads, guided=guided))
    honouring = [
        each
        for each in every
        if (not guided or pinned.cfg_degree in (None, each.cfg_degree))
        and pinned.ulysses_degree in (None, each.ulysses_degree)
        and pinned.ring_degree in (None, each.ring_degree)
    ]
    # The pins are for jobs with guidance: where cfg_degree 2 is among them, there may be no split for one without.
    yield from honouring if guided or honouring else every


def _every_split(*, world_size: int, num_heads: int, guided: bool) -> Iterator[ParallelDegrees]:
    for cfg_degree in (2, 1):
        if world_size % cfg_degree or (cfg_degree == 2 and not guided):
            continue
        sequence_degree = world_size // cfg_degree
        for ulysses_degree in range(sequence_degree, 0, -1):
            if sequence_degree % ulysses_degree or num_heads % ulysses_degree:
                continue
            yield ParallelDegrees(
                cfg_degree=cfg_degree, ulysses_degree=ulysses_degree, ring_degree=sequence_degree // ulysses_degree
            )


def check_pins(*, world_size: int, num_heads: int, pinned: PinnedDegrees) -> None:
    """Raises ValueError, with every factor, when no split of the world honours what the configuration pins."""
    if next(possible_degrees(world_size=world_size, num_heads=num_heads, guided=True, pinned=pinned), None):
        return
    fixed = [pinned.cfg_degree, pinned.ulysses_degree, pinned.ring_degree]
    if None not in fixed:
        check_degrees(
            ParallelDegrees(cfg_degree=fixed[0] or 1, ulysses_degree=fixed[1] or 1, ring_degree=fixed[2] or 1),
            world_size=world_size,
            num_heads=num_heads,
        )
    asked = " x ".join(
        f"{name} {'any' if value is None else value}"
        for name, value in zip(("cfg_degree", "ulysses_degree", "ring_degree"), fixed, strict=True)
    )
    raise ValueError(
        f"{asked} on world_size {world_size} with num_heads {num_heads}: no split satisfies this; possible are "
        + "; ".join(
            f"{each.cfg_degree} x {each.ulysses_degree} x {each.ring_degree}"
            for each in possible_degrees(world_size=world_size, num_heads=num_heads, guided=True)
        )
    )


def choose_degrees(
    *,
    world_size: int,
    shape: DitShape,
    num_tokens: int,
    guided: bool,
    machine: Machine,
    pinned: PinnedDegrees | None = None,
) -> ParallelDegrees:
    """The split with the least predicted time a step. Raises ValueError, with every factor, when none is possible.

    Of equals the first counts: CFG before Ulysses before ring.
    """
    splits = list(possible_degrees(world_size=world_size, num_heads=shape.num_heads, guided=guided, pinned=pinned))
    if not splits:
        check_pins(world_size=world_size, num_heads=shape.num_heads, pinned=pinned or PinnedDegrees())
        raise AssertionError("without guidance there is always a ring")
    return min(
        splits,
        key=lambda degrees: step_seconds(degrees, shape=shape, num_tokens=num_tokens, guided=guided, machine=machine),
    )


def step_flops(shape: DitShape, num_tokens: int) -> float:
    """Floating-point operations of one forward over all tokens: projections, attention and feed-forward."""
    dim, tokens = shape.dim, num_tokens
    # q, k, v, o of the self-attention; q, o of the cross-attention; two of the feed-forward.
    linear = 2 * tokens * dim * (6 * dim + 2 * shape.ffn_dim) + 2 * shape.text_tokens * dim * 2 * dim
    attention = 4 * tokens * dim * (tokens + shape.text_tokens)
    return float(shape.num_layers * (linear + attention))


def step_seconds(
    degrees: ParallelDegrees, *, shape: DitShape, num_tokens: int, guided: bool, machine: Machine
) -> float:
    """Predicted seconds of one denoising step.

    Compute is shared evenly, but for the last slice's padding. Ulysses moves q, k and v in one all-to-all and the
    result in a second. A ring passes keys and values on, hidden behind attention as far as that lasts. The branches
    of guidance meet once a step, over the latents.
    """
    slice_tokens = -(-num_tokens // degrees.sequence_degree)
    padding = slice_tokens * degrees.sequence_degree / num_tokens
    compute = step_flops(shape, num_tokens) * padding / degrees.sequence_degree / machine.flops_per_second
    slice_bytes = slice_tokens * shape.dim * machine.element_bytes
    exchange = 0.0
    if degrees.ulysses_degree > 1:
        leaves = (degrees.ulysses_degree - 1) / degrees.ulysses_degree
        exchange += 4 * slice_bytes * leaves / machine.link_bytes_per_second + 2 * machine.collective_seconds
    if degrees.ring_degree > 1:
        block_tokens = slice_tokens * degrees.ulysses_degree
        attention = 4 * block_tokens * block_tokens * shape.dim / degrees.ulysses_degree / machine.flops_per_second
        passing = 2 * slice_bytes / machine.link_bytes_per_second + machine.collective_seconds
        exchange += RING_OVERHEAD * degrees.ring_degree * attention
        # A hop's transfer hides behind a block's attention; its launch and the merging of two float32 results (read
        # twice, written once) do not.
        merging = 3 * 4 * slice_tokens * shape.dim / machine.memory_bytes_per_second
        exchange += (degrees.ring_degree - 1) * (
            max(0.0, passing - attention) + 2 * machine.collective_seconds + merging
        )
    branches = 2 if guided and degrees.cfg_degree == 1 else 1
    meeting = machine.collective_seconds if degrees.cfg_degree == 2 else 0.0
    return branches * (compute + shape.num_layers * exchange) + meeting
