"""What the broker says before anything is loaded: wrong credentials or a wrong topology need not cost a model's load.

Owns one look at the broker at the start. Leaves out waiting for it: rank 0's consumer does that, and looks again.
"""

import contextlib

import structlog

from daemon.config import Config
from daemon.connection import LOST, connect
from daemon.errors import BrokerUnavailableError
from daemon.topology import prepare_topology, topology_of

log = structlog.get_logger("consumer")


def look_at_broker(config: Config) -> None:
    """Raises CredentialsError and ConfigError as the consumer would. A broker that is away is only logged."""
    try:
        connection = connect(config.broker, name=f"reeld {config.worker_id} start")
    except BrokerUnavailableError as error:
        log.warning("broker_unavailable", reason=str(error))
        return
    try:
        prepare_topology(connection, topology_of(config), apply=config.topology.apply)
    except LOST as error:
        log.warning("connection_lost", reason=repr(error))
    finally:
        if connection.is_open:
            with contextlib.suppress(*LOST):
                connection.close()
