"""Metrics: what Prometheus scrapes, kept in the launcher so that the counters outlive a group of ranks.

Owns every metric's name, labels and buckets (docs/observability.md lists them), and the reader of what rank 0 tells
(`daemon.measurements`). What is true now (ranks, health, broker) is asked of `daemon.vitals` at each scrape. Leaves out
HTTP (`daemon.endpoint`). The ranks never import prometheus_client.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from daemon import __version__
from daemon.config import Config
from daemon.errors import ErrorCode
from daemon.measurements import PIPE_FILE
from daemon.vitals import View, Vitals

log = structlog.get_logger("launcher")

_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 60, 120, 300)
_JOB_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 240, 480, 900, 1800, 3600)
_WAIT_BUCKETS = (1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
_BROKER_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_PHASES = ("stage", "encode", "denoise", "decode", "finish")


class Metrics:
    """All metrics of one launcher. A context manager: inside it, rank 0's measurements are read from the pipe."""

    def __init__(self, config: Config, vitals: Vitals, runtime: Path, *, world_size: int) -> None:
        # Or each counter had a second series, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._path = runtime / PIPE_FILE
        self._thread = threading.Thread(target=self._run, name="measurements", daemon=True)
        ProcessCollector(registry=self._registry)
        self._registry.register(_Now(vitals))
        self._told = self._make_told()
        self._restarts = Counter(
            "reeld_group_restarts_total",
            "Groups of ranks that ended by themselves and were started again, by why.",
            ["reason"],
            registry=self._registry,
        )
        for reason in ("stalled", "survivors_killed", "rank_failed"):
            self._restarts.labels(reason)
        Info("reeld_build", "Versions of reeld and of what it runs on.", registry=self._registry).info(
            {
                "version": __version__,
                "python": python_version(),
                **{name: version(name) for name in ("torch", "diffsynth", "xfuser", "pika")},
            }
        )
        Info("reeld_worker", "Who this is, for joining with the events.", registry=self._registry).info(
            {"worker_id": config.worker_id, "pool": config.pool_name, "world_size": str(world_size)}
        )

    def group_restarted(self, reason: str) -> None:
        """A group ended by itself: it `stalled`, its `survivors_killed`, or a `rank_failed`."""
        self._restarts.labels(reason).inc()

    def render(self, accept: str | None) -> tuple[bytes, str]:
        """Everything as text or OpenMetrics, as the scraper accepts it, and its content type."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self._registry), content_type

    def __enter__(self) -> "Metrics":
        os.mkfifo(self._path, 0o600)
        # Also for writing: a pipe without a writer would end, and ranks come and go.
        self._pipe = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        os.write(self._pipe, b"\n")
        self._thread.join(timeout=5)
        os.close(self._pipe)

    def feed(self, line: bytes) -> None:
        """One measurement. What is none is logged and left out."""
        try:
            name, value, labels = json.loads(line)
            metric = self._told[name]
            child = metric.labels(**labels) if labels else metric
            match child:
                case Counter():
                    child.inc(value)
                case Histogram():
                    child.observe(value)
                case Gauge():
                    child.set(value)
        except (ValueError, TypeError, KeyError) as error:
            log.warning("measurement_not_understood", text=line[:200].decode(errors="replace"), reason=repr(error))

    def _run(self) -> None:
        rest = b""
        while True:
            *lines, rest = (rest + os.read(self._pipe, 65536)).split(b"\n")
            for line in lines:
                if not line:  # told by __exit__, after all that the ranks have told
                    return
                self.feed(line)

    def _make_told(self) -> dict[str, Counter | Histogram | Gauge]:
        """The metrics that rank 0 feeds, by the name it gives them."""
        registry = self._registry
        jobs = Counter(
            "reeld_jobs_total",
            "Jobs settled for good, by outcome (succeeded, failed, cancelled) and error code.",
            ["outcome", "code"],
            registry=registry,
        )
        jobs.labels("succeeded", "")
        jobs.labels("cancelled", str(ErrorCode.CANCELLED))
        for code in set(ErrorCode) - {ErrorCode.CANCELLED}:
            jobs.labels("failed", str(code))  # a rate needs the 0 before the first
        accepted = Counter("reeld_jobs_accepted_total", "Jobs that were begun.", ["redelivered"], registry=registry)
        reconnects = Counter(
            "reeld_broker_reconnects_total",
            "Connections to the broker that were lost and opened again.",
            ["connection"],
            registry=registry,
        )
        phase = Histogram(
            "reeld_job_phase_seconds",
            "Phases of a job on rank 0: stage (fetch inputs), encode, denoise, decode, finish (video file, manifest).",
            ["phase"],
            buckets=_JOB_BUCKETS,
            registry=registry,
        )
        for value in ("false", "true"):
            accepted.labels(value)
        for connection in ("consumer", "publisher"):
            reconnects.labels(connection)
        for name in _PHASES:
            phase.labels(name)
        return {
            "jobs": jobs,
            "accepted": accepted,
            "reconnects": reconnects,
            "phase": phase,
            "repeated": Counter(
                "reeld_jobs_repeated_total",
                "Deliveries of a job done before, answered from its manifest.",
                registry=registry,
            ),
            "retries": Counter(
                "reeld_job_retries_total",
                "Tries again for a passing reason, in place or over the retry ladder.",
                ["level", "code"],
                registry=registry,
            ),
            "requeued": Counter(
                "reeld_jobs_requeued_total", "Jobs given back to the queue, not for their fault.", registry=registry
            ),
            "queue_wait": Histogram(
                "reeld_job_queue_wait_seconds",
                "From the AMQP timestamp of a job to its beginning; first deliveries with a timestamp only.",
                buckets=_WAIT_BUCKETS,
                registry=registry,
            ),
            "job": Histogram(
                "reeld_job_seconds",
                "From the beginning of a job that succeeded to its ack.",
                buckets=_JOB_BUCKETS,
                registry=registry,
            ),
            "step": Histogram("reeld_step_seconds", "One denoising step.", buckets=_STEP_BUCKETS, registry=registry),
            "load": Gauge(
                "reeld_model_load_seconds",
                "How long the last load of a model took on rank 0.",
                ["model"],
                registry=registry,
            ),
            "publish": Histogram(
                "reeld_publish_seconds",
                "Until the broker confirmed a message that must arrive, waiting for the broker included.",
                buckets=_BROKER_BUCKETS,
                registry=registry,
            ),
            "publish_failures": Counter(
                "reeld_publish_failures_total", "Tries to publish such a message that failed.", registry=registry
            ),
            "ack": Histogram(
                "reeld_ack_seconds",
                "From the wish to ack to the ack on the wire; AMQP confirms no acks.",
                buckets=_BROKER_BUCKETS,
                registry=registry,
            ),
            "dropped": Counter(
                "reeld_measurements_dropped_total",
                "Measurements that are missing in these metrics: the launcher did not read them in time.",
                registry=registry,
            ),
        }


class _Now(Collector):
    """What is true at the moment of the scrape."""

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals

    def describe(self) -> Iterable[Metric]:
        return []  # or the registry would collect in order to know the names

    def collect(self) -> Iterable[Metric]:
        view = self._vitals.view()
        yield _gauge("reeld_live", "1 while no rank hangs (/livez).", not view.live)
        yield _gauge("reeld_ready", "1 while a job can be taken (/readyz).", not view.ready)
        draining = any(reason.reason == "draining" for reason in view.ready)
        yield _gauge("reeld_draining", "1 while it finishes its last job.", draining)
        yield _gauge("reeld_jobs_in_flight", "Deliveries taken and not settled.", view.service.get("in_hand", 0))
        connected = GaugeMetricFamily(
            "reeld_broker_connected",
            "1 while the connection is of use; absent until rank 0 has loaded, and consumes.",
            labels=["connection"],
        )
        if view.service.get("serving"):
            for connection in ("consumer", "publisher"):
                connected.add_metric([connection], float(not view.service[connection]["trouble"]))
        yield connected
        yield from _rank_gauges(view)


def _rank_gauges(view: View) -> Iterable[Metric]:
    known = GaugeMetricFamily("reeld_rank_up", "1 while the rank has said something lately.", labels=["rank"])
    age = GaugeMetricFamily(
        "reeld_rank_last_progress_age_seconds",
        "Since the rank last made progress; while it waits for others, since it last said so.",
        labels=["rank"],
    )
    limit = GaugeMetricFamily(
        "reeld_rank_stall_limit_seconds",
        "How old the last progress may get in what the rank does now; absent while it waits.",
        labels=["rank"],
    )
    memory = GaugeMetricFamily(
        "reeld_rank_memory_bytes",
        "Device memory a rank uses, holds, and used at most in its last job; without a GPU its resident set.",
        labels=["rank", "kind"],
    )
    silent = {reason.rank for reason in (*view.live, *view.ready) if reason.reason in ("rank_silent", "rank_stalled")}
    for number in view.unheard:
        known.add_metric([str(number)], 0)
    for rank in view.ranks:
        label = str(rank.rank)
        known.add_metric([label], float(rank.rank not in silent))
        age.add_metric([label], rank.progress_age_seconds)
        if rank.stall_limit_seconds is not None:
            limit.add_metric([label], rank.stall_limit_seconds)
        for kind in ("used", "reserved", "peak"):
            with contextlib.suppress(KeyError):  # before the rank has a device
                memory.add_metric([label, kind], rank.record[f"memory_{kind}_bytes"])
    return known, age, limit, memory


def _gauge(name: str, text: str, value: Any) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
