"""One message to publish: where it goes, its body, its AMQP properties. Leaves out publishing (`daemon.publisher`)."""

from dataclasses import dataclass, field
from typing import Any

import pika


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message to publish.

    `alternate_queue` is where the exchange's alternate exchange keeps what nobody is bound for; a warning is logged
    when the message went there.
    """

    exchange: str
    routing_key: str
    body: bytes
    mandatory: bool = False
    content_type: str = "application/json"
    message_id: str | None = None
    type: str | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    priority: int | None = None
    persistent: bool = True
    headers: dict[str, Any] = field(default_factory=dict)
    alternate_queue: str | None = None

    def properties(self) -> pika.BasicProperties:
        return pika.BasicProperties(
            content_type=self.content_type,
            delivery_mode=2 if self.persistent else 1,
            message_id=self.message_id,
            type=self.type,
            correlation_id=self.correlation_id,
            reply_to=self.reply_to,
            priority=self.priority,
            app_id="reeld",
            headers=self.headers or None,
        )
