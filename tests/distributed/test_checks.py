"""What is watched while a job is generated: NaN, devices and dtypes, and ranks that drift apart."""

import json
from pathlib import Path

import pytest
import torch

from parallel.checks import FiniteCheck, check_consistency
from parallel.outcome import InconsistentError, NonFiniteError
from tests.distributed.launch import run_module

CPU = torch.device("cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_found_one_step_later(bad: float) -> None:
    """A look is read once the next one is taken, and the last one when the loop is over."""
    latents, check = torch.zeros(1, 16, 3, 4, 4), FiniteCheck()
    check.look(latents)
    latents[0, 3, 1, 2, 2] = bad
    check.look(latents)
    check.raise_if_known()
    check.look(latents)
    with pytest.raises(NonFiniteError):
        check.raise_if_known()
    last = FiniteCheck()
    last.look(latents)
    last.raise_if_known()
    with pytest.raises(NonFiniteError):
        last.settle()


def test_what_is_where_it_must_not_be_is_named() -> None:
    """Rank, module, parameter, device and dtype are in the message, of weights and of conditions."""
    module = torch.nn.Linear(2, 2)
    good = {"latents": torch.zeros(1), "flag": True, "number": torch.zeros(1, dtype=torch.int64)}

    def check(module: torch.nn.Module, conditions: dict[str, object]) -> None:
        check_consistency([module], conditions, device=CPU, dtype=torch.float32, rank=3)

    check(module, good)
    with pytest.raises(InconsistentError, match=r"rank 3, .*cpu.*Linear\.weight is on meta"):
        check(torch.nn.Linear(2, 2, device="meta"), good)
    with pytest.raises(InconsistentError, match=r"the condition context is torch\.float64"):
        check(module, {**good, "context": torch.zeros(1, dtype=torch.float64)})
    with pytest.raises(InconsistentError, match="the condition y is on meta"):
        check(module, {**good, "y": torch.zeros(1, device="meta")})


def test_ranks_whose_latents_differ_all_say_so(tmp_path: Path) -> None:
    """Equal latents pass; one bit, or two elements that changed places, are noticed on every rank, with the odd one."""
    run_module("checks_ranks", tmp_path / "told", ranks=2)
    for rank in range(2):
        told = json.loads((tmp_path / f"told.{rank}").read_text())
        assert told["equal"] == ""
        for name in ("one bit", "exchanged"):
            assert told[name] == "after step 0 the latents of rank(s) [1] are not those of rank 0"
