"""The words that the ranks exchange."""

import json
from dataclasses import asdict, replace

import pytest

from parallel.plan import (
    Generate,
    Outcome,
    Shutdown,
    decode_command,
    encode_command,
)
from tests.plans import PLAN as SMALL

PLAN = replace(
    SMALL,
    attempt=2,
    prompt="ein Fuchs 🦊\n\0",
    seed=2**63 - 1,
    cfg_scale=0.1,
    time_limit_seconds=1700.0,
)


@pytest.mark.parametrize(
    "command",
    [Generate(PLAN), Generate(replace(PLAN, input_image="/work/job-1/input_image")), Shutdown("drained")],
)
def test_a_command_arrives_as_it_was_sent(command: Generate | Shutdown) -> None:
    """Every rank decodes exactly the plan that rank 0 encoded, to the last bit of its numbers."""
    assert decode_command(encode_command(command)) == command


@pytest.mark.parametrize(
    "message",
    [
        {"command": "pause"},
        {"command": "shutdown"},
        {"command": "generate", "plan": None},
        {"command": "generate", "plan": {**asdict(PLAN), "lora": "x"}},
        {"command": "generate", "plan": {k: v for k, v in asdict(PLAN).items() if k != "seed"}},
        [],
    ],
)
def test_a_command_of_another_version_is_refused(message: object) -> None:
    """A rank that is asked for what it does not know says so, instead of doing half of it."""
    with pytest.raises(ValueError, match="one version of reeld"):
        decode_command(json.dumps(message).encode())


@pytest.mark.parametrize("outcome", [Outcome(rank=0), Outcome(rank=7, code="internal", message="ü: boom")])
def test_an_outcome_arrives_as_it_was_reported(outcome: Outcome) -> None:
    """A rank's outcome survives the store, and only one without a code is ok."""
    assert Outcome.from_json(outcome.to_json()) == outcome
    assert outcome.ok == (outcome.code is None)
