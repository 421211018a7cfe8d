"""Models that come to the device to work: whole ones, and a text encoder of which two blocks come at a time."""

import copy
from typing import Any

import pytest
import torch
from diffsynth.models.wan_video_text_encoder import WanTextEncoder

from parallel.offload import OffloadedModels, stream_blocks

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


def test_a_model_for_which_there_is_no_room_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What had come of it goes back, and so does what was there before, as the next one's load expects."""
    models = {name: torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3))) for name in ("one", "two")}
    weights = {name: [tensor.data_ptr() for tensor in model.parameters()] for name, model in models.items()}
    offloaded = OffloadedModels(models, DEVICE)
    room = 6 + 4

    def to(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        nonlocal room
        room -= 1
        if room < 0:
            raise torch.OutOfMemoryError("no room")
        return tensor.clone()  # so that a CPU is another place, too

    def moved() -> dict[str, int]:
        return {
            name: sum(tensor.data_ptr() != host for tensor, host in zip(model.parameters(), weights[name], strict=True))
            for name, model in models.items()
        }

    monkeypatch.setattr(torch.Tensor, "to", to)
    offloaded.load(["one"])
    assert moved() == {"one": 6, "two": 0}
    with pytest.raises(torch.OutOfMemoryError):
        offloaded.load(["two"])
    assert moved() == {"one": 0, "two": 0}
    room = 100
    for name in ("one", "two"):
        offloaded.load([name])
        assert moved() == {"one": 0, "two": 0, name: 6}
