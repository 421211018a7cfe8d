"""Which splits are possible, which one is chosen, and what a wrong one is told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.split import (
    CUDA,
    DitShape,
    ParallelDegrees,
    PinnedDegrees,
    check_degrees,
    check_pins,
    choose_degrees,
    possible_degrees,
    step_flops,
)

SMALL = DitShape(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)  # Wan 2.1 1.3B
LARGE = DitShape(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)  # Wan 2.1 14B
TOKENS = 21 * 30 * 52  # 480x832x81


def chosen(shape: DitShape, world_size: int, *, guided: bool = True, **pins: int) -> tuple[int, int, int]:
    degrees = choose_degrees(
        world_size=world_size,
        shape=shape,
        num_tokens=TOKENS,
        guided=guided,
        machine=CUDA,
        pinned=PinnedDegrees(**pins),
    )
    return degrees.cfg_degree, degrees.ulysses_degree, degrees.ring_degree


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_every_world_has_a_split_and_every_split_is_whole(world_size: int, num_heads: int, guided: bool) -> None:
    """A ring takes any number of ranks, so no world is refused; each split that is offered passes the check."""
    splits = list(possible_degrees(world_size=world_size, num_heads=num_heads, guided=guided))
    assert splits
    assert len(set(splits)) == len(splits)
    for degrees in splits:
        check_degrees(degrees, world_size=world_size, num_heads=num_heads, guided=guided)


@pytest.mark.parametrize(
    ("degrees", "says"),
    [
        (ParallelDegrees(ulysses_degree=8), "must divide num_heads; it can be one of [1, 2, 3, 4, 6, 12]"),
        (ParallelDegrees(cfg_degree=2, ulysses_degree=2), "the product is 4, not 8"),
        (ParallelDegrees(cfg_degree=4, ulysses_degree=2), "cfg_degree is 1 or 2"),
        (ParallelDegrees(ulysses_degree=0), "at least 1"),
    ],
)
def test_a_wrong_split_is_told_every_factor(degrees: ParallelDegrees, says: str) -> None:
    """The refusal names all three degrees, the world and the heads, and what would do."""
    with pytest.raises(ValueError, match=r"cfg_degree .* ulysses_degree .*world_size 8.*num_heads 12") as e:
        check_degrees(degrees, world_size=8, num_heads=12)
    assert says in str(e.value)


def test_guidance_is_split_first() -> None:
    """Two branches need no exchange but one a step, so they go to two halves of the ranks."""
    assert chosen(SMALL, 2) == (2, 1, 1)
    assert chosen(LARGE, 2) == (2, 1, 1)
    assert chosen(LARGE, 8) == (2, 4, 1)


def test_eight_ranks_and_twelve_heads() -> None:
    """Twelve heads cannot be spread over eight ranks: with guidance four do, without it a ring must help."""
    assert chosen(SMALL, 8) == (2, 4, 1)
    cfg, ulysses, ring = chosen(SMALL, 8, guided=False)
    assert (cfg, ulysses * ring) == (1, 8)
    assert ring > 1


def test_without_guidance_there_is_no_second_branch() -> None:
    """cfg_scale 1 leaves nothing for a CFG degree, whatever the configuration pins for other jobs."""
    assert chosen(LARGE, 2, guided=False) == (1, 2, 1)
    assert chosen(LARGE, 2, guided=False, cfg_degree=2) == (1, 2, 1)


def test_a_pin_is_kept() -> None:
    """A degree that the configuration fixes is not chosen anew."""
    assert chosen(LARGE, 2, cfg_degree=1) == (1, 2, 1)
    assert chosen(LARGE, 4, ring_degree=4) == (1, 1, 4)


def test_a_job_without_guidance_keeps_the_pins_that_leave_it_a_split() -> None:
    assert chosen(LARGE, 4, guided=False, cfg_degree=1, ulysses_degree=2, ring_degree=2) == (1, 2, 2)
    assert chosen(LARGE, 2, guided=False, ulysses_degree=1) == (1, 1, 2)
    assert chosen(LARGE, 4, guided=False, cfg_degree=2, ulysses_degree=2, ring_degree=1) == (1, 4, 1), "there is none"


def test_a_pin_that_cannot_work_is_refused_at_start() -> None:
    """The refusal names the pins and lists the splits that are possible."""
    with pytest.raises(ValueError, match=r"ulysses_degree 5 .*possible are 2 x 4 x 1; 2 x 2 x 2; 2 x 1 x 4; 1 x 4 x 2"):
        check_pins(world_size=8, num_heads=12, pinned=PinnedDegrees(ulysses_degree=5))


def test_flops_are_those_of_the_published_models() -> None:
    """0.28 PFLOP for the 1.3B and 1.68 PFLOP for the 14B a forward, at 480x832 and 81 frames."""
    assert step_flops(SMALL, TOKENS) / 1e15 == pytest.approx(0.28, rel=0.03)
    assert step_flops(LARGE, TOKENS) / 1e15 == pytest.approx(1.68, rel=0.03)
