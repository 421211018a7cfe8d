"""The models and LoRAs of a configuration, checked on disk; without torch.

Leaves out loading them (`parallel.model`).
"""

from daemon.config import Config
from daemon.errors import ConfigError
from daemon.loras import check_loras
from parallel.profile import ModelFiles, ModelFolderError, check_model_folder, load_profile


def check_models(config: Config) -> list[ModelFiles]:
    """Checks every model folder and LoRA of the configuration. Raises ConfigError, one line, for the first fault."""
    found: list[ModelFiles] = []
    offered: dict[str, str] = {}
    for model in config.models:
        try:
            profile = load_profile(model.profile)
            files = check_model_folder(profile, model.path)
        except (ModelFolderError, ValueError) as error:
            raise ConfigError(str(error)) from error
        for task in profile.tasks:
            if task in offered:
                raise ConfigError(
                    f"models: {offered[task]} and {profile.name} both offer {task}; a pool needs one each"
                )
            offered[task] = profile.name
        found.append(files)
    check_loras(config.loras)
    return found
