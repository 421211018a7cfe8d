"""Reading weights on one rank: whatever a file holds lands where it belongs, bit for bit."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parallel import loading
from parallel.layouts import read_tensors
from parallel.loading import Destination, ReadError, Wanted, load_tensors
from parallel.world import World, join, read_launch


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return join(read_launch(), device_kind="cpu")


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    return path


def wanted(path: Path, places: dict[str, Sequence[Destination]]) -> list[Wanted]:
    return [
        Wanted(path=path, stored=tensor, shared=False, destinations=partial(places.__getitem__, tensor.name))
        for tensor in read_tensors(path)
        if tensor.name in places
    ]


def whole(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, Sequence[Destination]]:
    return {
        name: [Destination(torch.empty(tensor.numel(), dtype=dtype or tensor.dtype))]
        for name, tensor in tensors.items()
    }


def no_copies(*_arguments: object) -> None:
    raise AssertionError("copied")


def test_what_stays_as_it_is_stored_is_read_to_where_it_stays(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that span blocks, more in one block than a vector of `preadv` holds, and an empty one."""
    monkeypatch.setattr(loading, "BLOCK_BYTES", 64 * 1024)
    monkeypatch.setattr(loading, "_scatter", no_copies)
    tensors = {f"small.{number}": torch.randn(3).to(torch.bfloat16) for number in range(2 * loading.IOV_MAX)}
    tensors |= {"large": torch.randn(91, 777), "odd": torch.randint(0, 256, (70001,), dtype=torch.uint8)}
    tensors["none"] = torch.empty(0)
    path = stored(tmp_path, tensors)
    places = whole(tensors)
    told: list[tuple[int, int]] = []
    load_tensors(wanted(path, places), world, progress=lambda done, total: told.append((done, total)))
    for name, tensor in tensors.items():
        assert torch.equal(places[name][0].flat, tensor.reshape(-1)), name
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert told[-1] == (size, size)


def test_what_is_converted_cut_or_wanted_twice_is_copied(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "BLOCK_BYTES", 1000)
    tensors = {name: torch.randn(number) for number, name in ((700, "converted"), (701, "cut"), (702, "twice"))}
    path = stored(tmp_path, tensors)
    places = whole(tensors, torch.bfloat16)
    places["cut"] = [Destination(torch.empty(300), first=250)]
    places["twice"] = [Destination(torch.empty(702)) for _ in range(2)]
    load_tensors(wanted(path, places), world)
    assert torch.equal(places["converted"][0].flat, tensors["converted"].to(torch.bfloat16))
    assert torch.equal(places["cut"][0].flat, tensors["cut"][250:550])
    assert all(torch.equal(place.flat, tensors["twice"]) for place in places["twice"])


def test_a_file_that_ends_early_is_named(tmp_path: Path, world: World) -> None:
    tensors = {"a": torch.randn(1000), "b": torch.randn(1000)}
    path = stored(tmp_path, tensors)
    asked = wanted(path, whole(tensors))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    with pytest.raises(ReadError, match=f"{path}: ends early"):
        load_tensors(asked, world)


def test_memory_that_cannot_be_had_is_said(tmp_path: Path, world: World) -> None:
    """What makes the memory fails while the file is read."""
    tensors = {"a": torch.randn(1000)}
    (each,) = wanted(stored(tmp_path, tensors), whole(tensors))

    def fails() -> Sequence[Destination]:
        raise MemoryError("no page can be locked")

    with pytest.raises(MemoryError, match="no page can be locked"):
        load_tensors([Wanted(path=each.path, stored=each.stored, shared=each.shared, destinations=fails)], world)
