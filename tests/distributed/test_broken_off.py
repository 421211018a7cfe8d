"""After a generation that was broken off, a rank's models are where they were before it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from parallel.engine import clean_up, generate_frames
from parallel.model import load_model
from parallel.outcome import Stop, StoppedError
from parallel.profile import check_model_folder, load_profile
from parallel.strategy import MemorySettings
from parallel.vram import ManagedModels
from parallel.world import Launch, join
from tests.plans import PLAN


@pytest.mark.parametrize("fault", ["cancelled", "out of memory"])
def test_managed_weights_leave_the_device(fault: str, models: Path, tmp_path: Path) -> None:
    """Under vram_limit another model's layers would find their place taken for good."""
    world = join(Launch(rank=0, local_rank=0, world_size=1, restart_count=0), device_kind="cpu")
    files = check_model_folder(load_profile("tiny-i2v"), models / "tiny-i2v")
    model = load_model(files, world=world, dtype="float32", memory=MemorySettings("vram_limit"))
    image = str(tmp_path / "image.png")
    Image.new("RGB", (96, 64), "teal").save(image)
    plan = replace(PLAN, task="image_to_video", model="tiny-i2v", num_frames=5, input_image=image)
    loader = model.pipeline.load_models_to_device.__self__
    assert isinstance(loader, ManagedModels)

    def on_device() -> int:
        return sum(layer.state != 0 for layers in loader._layers.values() for layer in layers)

    seen = []

    def decide() -> Stop:
        seen.append(on_device())
        return Stop.CANCELLED if fault == "cancelled" and len(seen) == 2 else Stop.NO

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    assert on_device() == 0
    if fault == "out of memory":
        model.pipeline.image_encoder.register_forward_pre_hook(no_room)
        model.pipeline.image_encoder.encode_image = no_room
    with pytest.raises((StoppedError, torch.OutOfMemoryError)):
        generate_frames(plan, model, world, progress=lambda *_: None, decide=decide)
    assert fault != "cancelled" or seen[-1] > 0
    clean_up(model, world.device)
    assert on_device() == 0
