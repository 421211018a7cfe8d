"""LoRA names, files and layouts: what a job may ask for, and how it is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import ConfigError, PermanentJobError
from daemon.faults import Faults
from daemon.job import Lora
from daemon.loras import check_loras, resolve_loras
from daemon.sections import LoraConfig
from parallel.layouts import Layout
from parallel.lora_layout import LoraError, match_lora
from tests.unit.layouts import write_sparse

LAYERS = {f"blocks.{n}.{name}": (32, 16) for n in range(2) for name in ("self_attn.q", "self_attn.o", "ffn.0")}
DITS = {"dit": LAYERS}
EXPERTS = {"dit": LAYERS, "dit2": LAYERS}
Q = "blocks.0.self_attn.q"


def pair(down: str, up: str, *, rank: int = 4, out: int = 32) -> Layout:
    return {down: (rank, 16), up: (out, rank)}


@pytest.mark.parametrize(
    ("down", "up", "layer"),
    [
        (f"{Q}.lora_A.default.weight", f"{Q}.lora_B.default.weight", Q),
        (f"diffusion_model.{Q}.lora_down.weight", f"diffusion_model.{Q}.lora_up.weight", Q),
        (f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight", Q),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.lora_up.weight", Q),
        (
            "transformer.blocks.1.attn1.to_out.0.lora_A.weight",
            "transformer.blocks.1.attn1.to_out.0.lora_B.weight",
            "blocks.1.self_attn.o",
        ),
        ("blocks.1.ffn.net.0.proj.lora_A.weight", "blocks.1.ffn.net.0.proj.lora_B.weight", "blocks.1.ffn.0"),
    ],
)
def test_the_usual_names_are_understood(down: str, up: str, layer: str) -> None:
    """DiffSynth's, PEFT's, ComfyUI's, kohya's and diffusers' names lead to the layer; others are left unused."""
    match = match_lora(pair(down, up) | {"blocks.9.self_attn.q.diff_b": (32,)}, LAYERS)
    assert set(match.pairs) == {layer}
    assert (match.pairs[layer].up, match.pairs[layer].down) == (up, down)
    assert match.unused == ("blocks.9.self_attn.q.diff_b",)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({f"{Q}.lora_B.weight": (32, 4)}, "half"),
        (pair(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", out=33), "another model"),
        (pair(f"{Q}x.lora_A.weight", f"{Q}x.lora_B.weight"), "none of its tensors"),
        (pair(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight") | {f"{Q}.dora_scale": (32,)}, "DoRA"),
        (pair(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight") | {f"{Q}.alpha": (2,)}, "one number"),
        (
            pair(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")
            | pair(f"model.{Q}.lora_A.weight", f"model.{Q}.lora_B.weight"),
            "second pair",
        ),
    ],
)
def test_what_does_not_fit_is_refused(layout: Layout, reason: str) -> None:
    """Nothing is applied in part: a wrong shape, a missing half or another method ends with a reason."""
    with pytest.raises(LoraError, match=reason):
        match_lora(layout, LAYERS)


@pytest.fixture
def shelves(tmp_path: Path) -> tuple[LoraConfig, ...]:
    good = pair(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")
    write_sparse(tmp_path / "one.safetensors", good)
    write_sparse(tmp_path / "many" / "style.safetensors", good)
    write_sparse(tmp_path / "many" / "wrong.safetensors", pair("x.lora_A.weight", "x.lora_B.weight"))
    (tmp_path / "many" / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00." * 9)
    write_sparse(tmp_path / "secret.safetensors", good)
    (tmp_path / "many" / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    return (
        LoraConfig(name="one", path=tmp_path / "one.safetensors", target="low_noise"),
        LoraConfig(name="many", path=tmp_path / "many"),
    )


def test_names_lead_to_files_and_targets(shelves: tuple[LoraConfig, ...], tmp_path: Path) -> None:
    """A file has its configured name, one in a directory has both; the job's target wins over the configured one."""
    asked = [Lora(name="one", strength=0.5), Lora(name="many/style"), Lora(name="one", target="high_noise")]
    plans = resolve_loras(asked, shelves, EXPERTS)
    assert [(plan.name, plan.strength, plan.target) for plan in plans] == [
        ("one", 0.5, "low_noise"),
        ("many/style", 1.0, "both"),
        ("one", 1.0, "high_noise"),
    ]
    assert plans[1].path == str(tmp_path / "many" / "style.safetensors")
    before = plans[0].version
    write_sparse(tmp_path / "one.safetensors", pair(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", rank=8))
    assert resolve_loras(asked[:1], shelves, EXPERTS)[0].version != before


@pytest.mark.parametrize(
    ("lora", "path", "reason"),
    [
        ({"name": "two"}, "loras.1.name", "no LoRA 'two'"),
        ({"name": "many"}, "loras.1.name", "no LoRA"),
        ({"name": "many/none"}, "loras.1.name", "no LoRA"),
        ({"name": "many/link"}, "loras.1.name", "no LoRA"),
        ({"name": "many/wrong"}, "loras.1.name", "none of its tensors"),
        ({"name": "many/pickle"}, "loras.1.name", "pickle.safetensors: not a safetensors file"),
        ({"name": "one"}, "loras.1.target", "one DiT"),
    ],
)
def test_a_job_is_refused_by_the_field(
    lora: dict[str, Any], path: str, reason: str, shelves: tuple[LoraConfig, ...], tmp_path: Path
) -> None:
    """An unknown, wrong or hostile LoRA is `input_rejected` with its field, and tells no path of the worker's."""
    with pytest.raises(PermanentJobError, match=reason) as caught:
        resolve_loras([Lora(name="many/style"), Lora(**lora)], shelves, DITS)
    assert (caught.value.code, caught.value.path) == ("input_rejected", path)
    assert str(tmp_path) not in caught.value.message


def test_what_is_configured_is_checked_at_start(tmp_path: Path) -> None:
    """A configured file that is not there, or is no safetensors file, is a configuration error; one hides no other."""
    (tmp_path / "b.safetensors").write_text(json.dumps({"a": math.pi}))
    faults = Faults()
    check_loras([LoraConfig(name=name, path=tmp_path / f"{name}.safetensors") for name in ("a", "b")], faults)
    with pytest.raises(
        ConfigError, match=r"^loras\.0\.path: .*: no such file or directory\nloras\.1\.path: .*not a safetensors file"
    ):
        faults.raise_all()
