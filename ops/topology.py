"""`reeld topology`: what the broker needs, shown, declared or compared.

Owns the three sub-commands. Leaves out the topology itself (`daemon.topology`).
"""

from pathlib import Path

from daemon.client import apply_on, check_on
from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.topology import Difference, topology_of


def plan(config_path: Path | None) -> None:
    """Prints the plan, one object a line."""
    for line in topology_of(load_config(config_path)).plan_lines():
        print(line)


def apply(config_path: Path | None) -> None:
    """Declares what is missing. Raises ConfigError when something is there but different."""
    config = load_config(config_path)
    topology = topology_of(config)
    differences = apply_on(config.broker, topology)
    _refuse(
        differences,
        "these exist already but differently and were left as they are: delete them when they are empty"
        " (rabbitmqctl delete_queue NAME), or change the configuration",
    )
    print(f"applied: {_summary(len(topology.exchanges()), len(topology.queues()), len(topology.bindings()))}")


def check(config_path: Path | None) -> None:
    """Compares the broker with the plan. Raises ConfigError when anything differs."""
    config = load_config(config_path)
    topology = topology_of(config)
    differences = check_on(config.broker, topology)
    _refuse(differences, "the broker is not as planned: `reeld topology apply` declares what is missing")
    # AMQP 0-9-1 cannot ask for bindings, so nothing is claimed about them.
    print(f"as planned: {_summary(len(topology.exchanges()), len(topology.queues()), None)}")


def _refuse(differences: list[Difference], advice: str) -> None:
    if not differences:
        return
    for difference in differences:
        print(difference.text)
    raise ConfigError(advice)


def _summary(exchanges: int, queues: int, bindings: int | None) -> str:
    counted = f"{exchanges} exchanges, {queues} queues"
    return counted if bindings is None else f"{counted}, {bindings} bindings"
