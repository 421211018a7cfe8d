"""`reeld schema asyncapi`: the whole surface as one AsyncAPI 3.0 document.

Owns the document; its schemas come from the models that the daemon validates with. Leaves out the job's
fields (`daemon.job`) and the events' data (`ops.event_data`).
Source of the format: https://www.asyncapi.com/docs/reference/specification/v3.0.0
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel

from daemon.events import CONTENT_TYPE
from daemon.job import JOB_ID_PATTERN, job_json_schema
from ops.event_data import JOB_EVENTS, WORKER_EVENTS

_SCHEMA_FORMAT = "application/schema+json;version=draft-2020-12"


def asyncapi_document(*, prefix: str = "reeld") -> dict[str, Any]:
    """The document for a prefix: the channels for jobs, status, dead letters and control."""
    events = {
        **{f"job_{name}": _event(f"reeld.job.{name}", model) for name, model in JOB_EVENTS.items()},
        **{f"worker_{name}": _event(f"reeld.worker.{name}", model) for name, model in WORKER_EVENTS.items()},
    }
    channels: dict[str, Any] = {
        "jobs": {
            "address": "{pool}",
            "title": "Where publishers send jobs",
            "parameters": {"pool": {"description": "what the worker makes; by default its model profile's name"}},
            "messages": {"job": {"$ref": "#/components/messages/job"}},
            "bindings": _exchange(f"{prefix}.jobs", "direct"),
        },
        "dead_letters": {
            "address": f"{prefix}.jobs.{{pool}}.dead",
            "title": "Jobs that could not be done, with the reason in their headers",
            "parameters": {"pool": {"description": "the pool the job was sent to"}},
            "messages": {"dead_letter": {"$ref": "#/components/messages/dead_letter"}},
            "bindings": {"amqp": {"is": "queue", "queue": {"name": f"{prefix}.jobs.{{pool}}.dead", "durable": True}}},
        },
        **{f"job_{name}": _status_channel(prefix, "job", "job_id", name) for name in JOB_EVENTS},
        **{f"worker_{name}": _status_channel(prefix, "worker", "worker_id", name) for name in WORKER_EVENTS},
        "cancel": _control_channel(
            prefix,
            "cancel",
            "job_id",
            "Ends a job, running or queued; an empty message is enough. Each worker answers: job_cancel_noted",
        ),
        "drain": _control_channel(
            prefix,
            "drain",
            "worker_id",
            "The worker finishes its job and stops. It answers each such message: worker_draining",
        ),
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "reeld",
            "version": _version(),
            "description": "A video-generation worker: jobs in, events and video files out, over RabbitMQ.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"broker": {"host": "127.0.0.1:5672", "protocol": "amqp", "protocolVersion": "0.9.1"}},
        "channels": channels,
        "operations": {
            "take_jobs": _operation("receive", "jobs", "The worker consumes jobs, one at a time."),
            "keep_dead_letters": _operation("send", "dead_letters", "The worker and the broker put aside what failed."),
            "hear_cancel": _operation("receive", "cancel", "The worker ends the job at its next step."),
            "hear_drain": _operation("receive", "drain", "The worker finishes its job and stops."),
            **{f"tell_{key}": _operation("send", key, None) for key in events},
        },
        "components": {
            "messages": {
                "job": {
                    "title": "Job",
                    "contentType": "application/json",
                    "headers": {"type": "object", "properties": {"traceparent": {"type": "string"}}},
                    "payload": _payload(job_json_schema()),
                    "bindings": {"amqp": {"contentEncoding": "utf-8", "messageType": "reeld.job/1"}},
                },
                "dead_letter": {
                    "title": "Dead letter: the job's body as it came",
                    "headers": {
                        "type": "object",
                        "properties": {
                            "x-reeld-code": {
                                "type": "string",
                                "description": "an error code of the failed event",
                            },
                            "x-reeld-path": {"type": "string", "description": "the field at fault"},
                            "x-reeld-message": {"type": "string"},
                            "x-reeld-time": {"type": "string", "format": "date-time"},
                            "x-reeld-worker": {"type": "string", "description": "the worker that gave it up"},
                            "x-reeld-requeued-from": {
                                "type": "array",
                                "items": {"type": "object"},
                                "description": "what it had failed of when somebody requeued it before",
                            },
                        },
                    },
                    "payload": {},
                },
                "control": {"title": "Control: only the routing key counts", "payload": {}},
                **events,
            }
        },
    }


def _status_channel(prefix: str, kind: str, parameter: str, name: str) -> dict[str, Any]:
    return {
        "address": f"{kind}.{{{parameter}}}.{name}",
        "parameters": {parameter: {"description": f"the {kind}'s id"}},
        "messages": {name: {"$ref": f"#/components/messages/{kind}_{name}"}},
        "bindings": _exchange(f"{prefix}.status", "topic"),
    }


def _control_channel(prefix: str, word: str, parameter: str, title: str) -> dict[str, Any]:
    return {
        "address": f"{word}.{{{parameter}}}",
        "title": title,
        "parameters": {parameter: {"description": f"the {parameter}"}},
        "messages": {word: {"$ref": "#/components/messages/control"}},
        "bindings": _exchange(f"{prefix}.control", "topic"),
    }


def _exchange(name: str, kind: str) -> dict[str, Any]:
    exchange = {"name": name, "type": kind, "durable": True, "autoDelete": False}
    return {"amqp": {"is": "routingKey", "exchange": exchange, "bindingVersion": "0.3.0"}}


def _operation(action: str, channel: str, summary: str | None) -> dict[str, Any]:
    operation: dict[str, Any] = {"action": action, "channel": {"$ref": f"#/channels/{channel}"}}
    if summary:
        operation["summary"] = summary
    return operation


def _event(type_: str, data: type[BaseModel]) -> dict[str, Any]:
    """A CloudEvents 1.0 envelope around the model's schema."""
    schema = data.model_json_schema(mode="serialization")
    definitions = schema.pop("$defs", None)
    text = {"type": "string", "minLength": 1}
    envelope: dict[str, Any] = {
        "type": "object",
        "required": ["specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data"],
        "properties": {
            "specversion": {"const": "1.0"},
            "id": {**text, "description": "the same for repeats of one terminal event"},
            "source": text,
            "type": {"const": type_},
            "subject": {"type": "string", "pattern": JOB_ID_PATTERN} if type_.startswith("reeld.job.") else text,
            "time": {"type": "string", "format": "date-time"},
            "datacontenttype": {"const": "application/json"},
            "traceparent": text,
            "data": schema,
        },
    }
    if definitions:
        envelope["$defs"] = definitions
    return {"title": type_, "contentType": CONTENT_TYPE, "payload": _payload(envelope)}


def _payload(schema: dict[str, Any]) -> dict[str, Any]:
    return {"schemaFormat": _SCHEMA_FORMAT, "schema": schema}


def _version() -> str:
    try:
        return version("reeld")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"
