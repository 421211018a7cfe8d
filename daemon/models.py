"""The models and LoRAs of a configuration, checked on disk and against the ranks that are to run them; without torch.

Leaves out loading them (`parallel.model`).
"""

from daemon.config import Config
from daemon.faults import Faults
from daemon.loras import check_loras
from parallel.profile import ModelFiles, ModelFolderError, check_model_folder, load_profile
from parallel.split import check_pins
from parallel.strategy import MemorySettings


def check_models(config: Config, *, world_size: int | None) -> list[ModelFiles]:
    """Checks every model folder and LoRA, and whether memory and split suit so many ranks. None: nobody knows yet.

    Raises ConfigError with every fault, one a line, each with the path of its setting.
    """
    faults = Faults()
    found: list[ModelFiles] = []
    offered: dict[str, str] = {}
    for index, model in enumerate(config.models):
        with faults.at(f"models.{index}.profile", ValueError):
            profile = load_profile(model.profile)
            twice = [task for task in profile.tasks if task in offered]
            if twice:
                what = f"{offered[twice[0]]} and {profile.name} both offer {', '.join(twice)}; a pool needs one each"
                faults.add(f"models.{index}.profile", what)
            offered |= dict.fromkeys(profile.tasks, profile.name)
            with faults.at(f"models.{index}.path", ModelFolderError):
                found.append(check_model_folder(profile, model.path))
            if world_size is not None:
                with faults.at("parallel", ValueError):
                    pinned = config.parallel.pinned()
                    check_pins(world_size=world_size, num_heads=profile.num_heads, pinned=pinned)
    with faults.at("memory", ValueError):
        MemorySettings(config.memory, config.vram_limit_gib).check(world_size=world_size or 1)
    check_loras(config.loras, faults)
    faults.raise_all()
    return found
