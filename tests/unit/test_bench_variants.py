"""What the benchmark compares with."""

import pytest
import torch


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of what DiffSynth's pipelines import
def test_plain_diffsynth_is_also_measured_without_what_was_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention is torch's within, and afterwards what it was."""
    from diffsynth.models import wan_video_dit

    from parallel.bench_variants import without_added_kernels

    monkeypatch.setattr(wan_video_dit, "FLASH_ATTN_3_AVAILABLE", True)  # which this machine has not
    q = k = v = torch.randn(1, 6, 8)
    with pytest.raises(NameError, match="flash_attn_interface"):
        wan_video_dit.flash_attention(q, k, v, num_heads=2)
    with without_added_kernels():
        by_torch = wan_video_dit.flash_attention(q, k, v, num_heads=2)
    assert torch.equal(by_torch, wan_video_dit.flash_attention(q, k, v, num_heads=2, compatibility_mode=True))
    assert wan_video_dit.FLASH_ATTN_3_AVAILABLE


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_a_shape_has_the_tokens_of_the_models_own_vae() -> None:
    """As Wan's reports count them: TI2V-5B's VAE folds 16 pixels, others eight, and a token is two latents wide."""
    from parallel.bench_variants import Case

    assert Case(height=480, width=832, num_frames=81).num_tokens == 32_760
    assert Case(height=704, width=1280, num_frames=121, vae_factor=16).num_tokens == 27_280
