"""A worker whose user may do what `docs/brokers.md` says, and nothing else."""

import json
import re
import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest
from PIL import Image

from daemon import client
from daemon.connection import connect
from daemon.errors import CredentialsError
from daemon.sections import BrokerConfig
from ops.private_broker import PrivateBroker
from tests.broker.daemon_under_fault import TOPOLOGY, daemon_under_fault, prepare_broker
from tests.harness import job, publish, take
from tests.node import api

_PAGE = Path(__file__).parents[2] / "docs" / "brokers.md"


def _documented() -> dict[str, str]:
    """The permissions of the page's command."""
    (command,) = re.findall(r"^rabbitmqctl set_permissions .*$", _PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    configure, write, read = shlex.split(command)[-3:]
    return {"configure": configure, "write": write, "read": read}


@pytest.fixture
def restricted(broker: PrivateBroker, vhost: str) -> Iterator[str]:
    """The URL of a user of its own who has the documented permissions on the virtual host."""
    name = f"worker-{secrets.token_hex(4)}"
    api(broker, "PUT", f"/users/{name}", {"password": "secret", "tags": ""})
    api(broker, "PUT", f"/permissions/{vhost.rpartition('/')[2]}/{name}", _documented())
    yield vhost.replace("guest:guest", f"{name}:secret")
    api(broker, "DELETE", f"/users/{name}")


def test_a_user_without_permissions_on_the_virtual_host_is_told_so(broker: PrivateBroker, vhost: str) -> None:
    """RabbitMQ answers as if it were not there; both are named."""
    name = f"stranger-{secrets.token_hex(4)}"
    api(broker, "PUT", f"/users/{name}", {"password": "secret", "tags": ""})
    with pytest.raises(CredentialsError, match=r"it is not there, or the user has no permissions on it") as caught:
        connect(BrokerConfig(url=vhost.replace("guest:guest", f"{name}:secret")), name="test")
    assert "docs/brokers.md" in str(caught.value)
    api(broker, "DELETE", f"/users/{name}")


def test_a_whole_job_with_a_retry_and_a_reply(
    broker: PrivateBroker, vhost: str, restricted: str, models: Path, tmp_path: Path
) -> None:
    """The topology is applied and checked; a job takes the ladder, ends with a video and is answered; a bad one too."""
    assert client.apply_on(BrokerConfig(url=restricted), TOPOLOGY) == []
    prepare_broker(vhost)
    with pika.BlockingConnection(pika.URLParameters(vhost)) as connection:
        connection.channel().queue_declare("replies", durable=True)
    image = tmp_path / "late.png"
    message = job(task="image_to_video", inputs={"input_image": image.as_uri()})
    with daemon_under_fault(restricted, broker.amqp_port, tmp_path, models) as daemon:
        publish(vhost, message, reply_to="replies", correlation_id="mine")
        daemon.worker.wait_log("job_retried_later", job_id=message["job_id"])
        Image.new("RGB", (96, 64), "teal").save(image)
        daemon.worker.wait_log("job_succeeded", job_id=message["job_id"])
        publish(vhost, job(job_id="bad", surprise=1), reply_to="replies", correlation_id="also mine")
        daemon.worker.wait_log("job_malformed", job_id="bad")
        assert daemon.worker.drain() == 0, daemon.worker.tail()
        assert not daemon.events("publish_failed")
        assert not daemon.events("connection_lost")
    replies = [(properties.correlation_id, json.loads(body)) for properties, body in take(vhost, "replies")]
    assert [(mine, reply["type"], reply["subject"]) for mine, reply in replies] == [
        ("mine", "reeld.job.succeeded", message["job_id"]),
        ("also mine", "reeld.job.failed", "bad"),
    ]
