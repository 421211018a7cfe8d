"""A text encoder whose blocks come to the device two at a time."""

import copy
from typing import Any

import pytest
import torch
from diffsynth.models.wan_video_text_encoder import WanTextEncoder

from parallel.offload import stream_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def encoder() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab": 50, "dim": 32, "dim_attn": 32, "dim_ffn": 64, "num_heads": 4, "num_layers": 5}
    return WanTextEncoder(**sizes).eval().requires_grad_(False)


IDS = torch.arange(12).view(1, 12)
MASK = torch.ones(1, 12, dtype=torch.long)


def test_a_streamed_encoder_encodes_the_same(encoder: Any) -> None:
    """To the bit, the second time too; and its weights are where they were."""
    whole = copy.deepcopy(encoder).to(DEVICE)
    host = [tensor.data_ptr() for tensor in encoder.blocks.parameters()]
    stream_blocks(encoder, DEVICE)
    for ids in (IDS, IDS.flip(1)):
        expected = whole(ids.to(DEVICE), MASK.to(DEVICE))
        assert torch.equal(encoder(ids.to(DEVICE), MASK.to(DEVICE)), expected)
    assert [tensor.data_ptr() for tensor in encoder.blocks.parameters()] == host


def test_a_call_that_breaks_off_leaves_nothing(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block runs out of memory: its weights are the host's again, and the next call is as if nothing had been."""
    whole = copy.deepcopy(encoder).to(DEVICE)
    host = [tensor.data_ptr() for tensor in encoder.blocks.parameters()]
    stream_blocks(encoder, DEVICE)

    def fail(_x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(encoder.blocks[3].ffn, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            encoder(IDS.to(DEVICE), MASK.to(DEVICE))
    assert [tensor.data_ptr() for tensor in encoder.blocks.parameters()] == host
    expected = whole(IDS.to(DEVICE), MASK.to(DEVICE))
    assert torch.equal(encoder(IDS.to(DEVICE), MASK.to(DEVICE)), expected)
