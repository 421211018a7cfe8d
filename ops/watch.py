"""`reeld watch`: events as they come, as lines for people or as the JSON they are.

Owns following and reconnecting. Leaves out AMQP (`daemon.client`) and the words (`ops.progress`).
"""

import json
import sys

import tenacity

from daemon.client import EventStream, ReceivedEvent
from daemon.errors import BrokerUnavailableError
from daemon.sections import BrokerConfig
from ops.progress import describe


def routing_keys(job_id: str | None, *, worker: bool) -> list[str]:
    """What to bind: everything, one job, or the workers."""
    keys = []
    if job_id is not None:
        keys.append(f"job.{job_id}.*")
    if worker:
        keys.append("worker.#")
    return keys or ["#"]


def watch(broker: BrokerConfig, keys: list[str], *, as_json: bool) -> None:
    """Prints events until Ctrl-C. A broker that is away at first is an error; later it is waited for."""
    try:
        stream = EventStream(broker, keys)
        while True:
            try:
                with stream:
                    _print_all(stream, as_json=as_json)
            except BrokerUnavailableError as error:
                print(f"reeld: {error}; events may be missed until it is back", file=sys.stderr)
            stream = tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(BrokerUnavailableError),
                wait=tenacity.wait_random_exponential(
                    multiplier=broker.backoff_initial_seconds, max=broker.backoff_max_seconds
                ),
            )(EventStream, broker, keys)
            print("reeld: following again", file=sys.stderr)
    except KeyboardInterrupt:
        return


def line(event: ReceivedEvent) -> str:
    """`11:24:57 job 0198f0c2 denoising 3/8, 0.4 s/step`."""
    kind, _, rest = event.routing_key.partition(".")
    subject = rest.rpartition(".")[0]
    clock = event.time[11:19] or "--:--:--"
    return f"{clock} {kind} {subject} {describe(event)}"


def _print_all(stream: EventStream, *, as_json: bool) -> None:
    while True:
        event = stream.next(3600)
        if event is None:
            continue
        print(_one_line(event.body) if as_json else line(event), flush=True)


def _one_line(body: str) -> str:
    """The body as it came, if it is one line; somebody else's event may be spread over several."""
    if "\n" not in body:
        return body
    try:
        return json.dumps(json.loads(body), ensure_ascii=False)
    except ValueError:
        return json.dumps(body, ensure_ascii=False)
