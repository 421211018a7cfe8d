"""Everything about a configuration that can be judged without the broker and the GPUs, and without torch.

Owns finding every fault at once. Leaves out the settings' own bounds (`daemon.config`), which come first, and what the
broker says (`daemon.preflight`).
"""

from daemon.config import Config
from daemon.connection import tls_context
from daemon.faults import Faults
from daemon.models import check_models
from daemon.writable import NoHardLinksError, write_into


def check(config: Config, *, make_folders: bool = False) -> None:
    """Raises ConfigError with every fault, one a line, each with the path of its setting.

    Without `make_folders` nothing is made: who only asks may be root, and the worker somebody else.
    """
    faults = Faults()
    with faults.gather():
        check_models(config, world_size=known_nproc(config))
    with faults.gather():
        config.broker.resolved_url()
    with faults.gather():
        tls_context(config.broker)
    folders = {
        "output.directory": config.output.directory,
        "work_directory": config.work_directory,
        "log.directory": config.log.directory,
    }
    for path, directory in folders.items():
        if directory is None:
            continue
        try:
            if make_folders:
                directory.mkdir(parents=True, exist_ok=True)
            write_into(directory, hard_links=path == "output.directory")
        except NoHardLinksError as error:
            faults.add(path, f"{directory}: {error.strerror}")
        except OSError as error:
            faults.add(path, f"{directory}: not writable: {error.strerror}")
    if "file" in config.inputs.schemes and not config.inputs.roots:
        faults.add("inputs.roots", "name the folders that file: URIs may point into, or take file out of schemes")
    faults.raise_all()


def known_nproc(config: Config) -> int | None:
    """How many ranks `reeld run` starts; None while that depends on the GPUs there are."""
    if config.nproc_per_node != "auto":
        return config.nproc_per_node
    return 1 if config.device == "cpu" else None
