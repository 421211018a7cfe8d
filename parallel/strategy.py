"""Where a model's weights are while the worker lives: the memory strategies, by name (docs/memory.md).

Pure Python, because the configuration and `reeld plan` know them too. Leaves out doing it (`model.py`).
"""

from dataclasses import dataclass

STRATEGIES = ("resident", "encoder_offload", "fsdp", "vram_limit")


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """`vram_limit_gib`: how full DiffSynth's VRAM management may make the device, for that strategy only."""

    strategy: str = "resident"
    vram_limit_gib: float | None = None

    @property
    def offloads_encoders(self) -> bool:
        """Whether the encoders are on the device only while they work; so that rank 0 needs no more than the others."""
        return self.strategy in ("encoder_offload", "fsdp")

    def check(self, *, world_size: int) -> None:
        """Raises ValueError, saying what to change, when the strategy cannot work on so many ranks."""
        if self.strategy not in STRATEGIES:
            raise ValueError(f"memory strategy {self.strategy!r} is unknown: give one of {', '.join(STRATEGIES)}")
        if self.strategy == "vram_limit" and world_size > 1:
            raise ValueError(
                f"memory strategy vram_limit is for one rank, not {world_size}: use fsdp, which spreads the weights"
            )
        if self.vram_limit_gib is not None and self.strategy != "vram_limit":
            raise ValueError(f"vram_limit_gib is for the memory strategy vram_limit, not for {self.strategy}")
