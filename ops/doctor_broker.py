"""`reeld doctor` on the broker: whether it answers, its version and limits, the topology, what waits in the queues.

What AMQP cannot ask for (`consumer_timeout`) is said as such, with what would have to be true. Leaves out TLS
(`ops.doctor_tls`).
"""

from collections.abc import Iterator

from daemon.broker_probe import BrokerFacts, broker_facts, count_in_each, refusal_of_message
from daemon.client import check_on
from daemon.config import Config
from daemon.errors import BrokerUnavailableError, CredentialsError, FatalError
from daemon.topology import topology_of
from ops.doctor_tls import examine_tls
from ops.finding import Finding, State

_CONSUMER_TIMEOUT_DEFAULT_SECONDS = 1800
# At-least-once dead-lettering came with it.
_OLDEST = (3, 10)
_TESTED = ((3, 10), (4, 0), (4, 3))
# A dead letter's headers: the publisher's own, up to 32 KiB, and our reason; they must fit into one frame.
_FRAME_BYTES = 65_536


def examine_broker(config: Config) -> Iterator[Finding]:
    yield from examine_tls(config.broker)
    try:
        facts = broker_facts(config.broker)
    except CredentialsError as error:
        yield Finding("broker", "fail", str(error), "correct the user, password and virtual host of broker.url")
        return
    except BrokerUnavailableError as error:
        yield Finding("broker", "fail", str(error), "start the broker, or correct host and port in broker.url")
        return
    except FatalError as error:
        yield Finding("broker", "fail", str(error), "correct [broker] in the configuration")
        return
    yield _version(facts)
    yield _frame(facts)
    try:
        yield _largest_message(config)
        yield _topology(config)
        yield _delivery_limit(config, facts)
        yield _consumer_timeout(config)
        yield from _waiting(config)
    except (BrokerUnavailableError, FatalError) as error:
        yield Finding("broker", "fail", str(error), "look at the broker's log")


def _version(facts: BrokerFacts) -> Finding:
    text = f"{facts.address}: {facts.product} {facts.version}"
    if facts.release < _OLDEST:
        return Finding("broker", "fail", text, "upgrade it: dead letters of quorum queues need RabbitMQ 3.10")
    if facts.release not in _TESTED:
        tested = ", ".join(f"{major}.{minor}" for major, minor in _TESTED)
        return Finding("broker", "ok", f"{text} (reeld is tested on {tested})")
    return Finding("broker", "ok", text)


def _frame(facts: BrokerFacts) -> Finding:
    if 0 < facts.frame_max < _FRAME_BYTES:
        text = (
            f"frame_max is {facts.frame_max} bytes: a message whose headers do not fit into a frame cannot be sent on"
        )
        fix = "leave frame_max at its default (131072) in rabbitmq.conf"
        return Finding("frame size", "warn", text, fix)
    return Finding("frame size", "ok", f"frame_max is {facts.frame_max or 'without limit'}")


def _largest_message(config: Config) -> Finding:
    size = config.limits.max_body_bytes
    refusal = refusal_of_message(config.broker, size)
    if refusal is None:
        return Finding("message size", "ok", f"the broker took a message of limits.max_body_bytes ({size})")
    text = f"the broker refuses a message of limits.max_body_bytes ({size}): {refusal}"
    fix = "raise max_message_size in rabbitmq.conf, lower limits.max_body_bytes, or end the broker's alarm"
    return Finding("message size", "fail", text, fix)


def _topology(config: Config) -> Finding:
    topology = topology_of(config)
    differences = check_on(config.broker, topology)
    if not differences:
        return Finding("topology", "ok", f"{len(topology.queues())} queues and {len(topology.exchanges())} exchanges")
    text = "\n".join(difference.text for difference in differences)
    if all(difference.text.startswith("-") for difference in differences):
        state: State = "warn" if config.topology.apply else "fail"
        return Finding("topology", state, text, "`reeld topology apply` (or topology.apply = true) declares them")
    return Finding("topology", "fail", text, "delete what differs once it is empty, then `reeld topology apply`")


def _delivery_limit(config: Config, facts: BrokerFacts) -> Finding:
    limit = config.topology.delivery_limit
    counts = "a rejected delivery and a lost connection count, a job handed back in a drain does not"
    if facts.release < (4, 3):
        counts = "a lost connection counts, and so does a job handed back in a drain"
    return Finding("delivery limit", "ok", f"a job is given up after {limit} deliveries without an end; here {counts}")


def _consumer_timeout(config: Config) -> Finding:
    # A prefetched job waits, unacked, for the one before it: both times count against the broker's timeout.
    held = config.limits.time_limit_seconds * config.broker.prefetch_count
    sum_ = f"limits.time_limit_seconds {config.limits.time_limit_seconds:g} x broker.prefetch_count"
    text = (
        f"the broker's consumer_timeout cannot be asked over AMQP; its default is"
        f" {_CONSUMER_TIMEOUT_DEFAULT_SECONDS} s, and a job may be held {held:g} s"
        f" ({sum_} {config.broker.prefetch_count})"
    )
    if held < _CONSUMER_TIMEOUT_DEFAULT_SECONDS:
        return Finding("consumer timeout", "ok", text)
    return Finding(
        "consumer timeout",
        "warn",
        text,
        f"see that the broker has consumer_timeout = {round(held * 1000) + 60_000} or more in rabbitmq.conf,"
        " or lower the time limit",
    )


def _waiting(config: Config) -> Iterator[Finding]:
    topology = topology_of(config)
    counted = count_in_each(config.broker, [topology.jobs_queue, topology.dead_queue, topology.unrouted])
    if not counted:
        return
    dead, unrouted = counted.get(topology.dead_queue, 0), counted.get(topology.unrouted, 0)
    text = (
        f"{counted.get(topology.jobs_queue, 0)} jobs wait, {dead} dead letters, {unrouted} last events without listener"
    )
    if dead:
        fix = f"`reeld dlq list --pool {topology.pool}` says why"
        yield Finding("queues", "warn", text, fix)
    else:
        yield Finding("queues", "ok", text)
