"""From frames to a durable result: video file -> manifest -> confirmed terminal event -> ack, in this order.

Owns the commit and the thread it runs on, so that the next job's denoising overlaps it, and what a manifest answers.
Leaves out generating the frames (`daemon.coordinator`) and the files themselves (`daemon.storage`).
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars

from daemon.config import Config
from daemon.delivery import Delivery
from daemon.errors import ErrorCode, PermanentJobError
from daemon.events import now
from daemon.health import RankState
from daemon.job import Job
from daemon.measurements import SILENT, Measurements
from daemon.planning import Draft
from daemon.reporter import Reporter
from daemon.settlement import Settlement
from daemon.storage import Storage
from daemon.video import CODEC, encode_video
from parallel.plan import GenerationPlan, LoraPlan
from parallel.tasks import TASK_PARAMETERS

log = structlog.get_logger("job")

# What of every plan the result repeats, as it was used.
_ASKED = (
    "model",
    "task",
    "seed",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "cfg_scale",
    "sigma_shift",
    "tea_cache_l1_thresh",
    "cfg_degree",
    "ulysses_degree",
    "ring_degree",
    "tiled",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A job whose frames are there. `frames` is (num_frames, height, width, 3), uint8; `accepted_at` monotonic."""

    job: Job
    delivery: Delivery
    draft: Draft
    plan: GenerationPlan
    frames: Any
    timings: dict[str, float]
    accepted_at: float


class Finisher:
    """Finishes one job at a time, off the main thread, and acks each by its own commit."""

    def __init__(
        self,
        config: Config,
        state: RankState,
        settlement: Settlement,
        reporter: Reporter,
        storage: Storage,
        measurements: Measurements = SILENT,
    ) -> None:
        self._config = config
        self._state = state
        self._settlement = settlement
        self._reporter = reporter
        self._storage = storage
        self._measurements = measurements
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finisher")
        self._running: dict[str, Future[None]] = {}

    def submit(self, generated: Generated) -> None:
        """Finishes the job later, and acks or requeues its delivery."""
        future = self._thread.submit(self._finish, generated)
        self._running = {key: value for key, value in self._running.items() if not value.done()}
        self._running[generated.job.job_id] = future

    def wait_for(self, job_id: str) -> None:
        """Waits until an earlier delivery of the same job is finished: its manifest answers this one."""
        earlier = self._running.pop(job_id, None)
        if earlier is not None:
            earlier.result()

    def has(self, job_id: str) -> bool:
        """Whether the job is being finished, or waits for it. For any thread."""
        future = self._running.get(job_id)
        return future is not None and not future.done()

    def wait_for_all(self, *, timeout_seconds: float) -> None:
        """Gives what is being finished some time, before the process ends."""
        wait(list(self._running.values()), timeout=timeout_seconds)

    def close(self) -> None:
        """Waits until all is finished."""
        self._thread.shutdown(wait=True)

    def has_manifest(self, job_id: str) -> bool:
        """Whether the job was done before. For any thread."""
        return self._storage.read_manifest(job_id) is not None

    def answer_from_manifest(self, job: Job, delivery: Delivery) -> bool | None:
        """Publishes the terminal event of a job that was done before again. None: it was not done.

        Returns whether the event was confirmed; if not, the delivery is handed back.
        Raises PermanentJobError when another request was done under this id.
        """
        # A file server that is away may not even say so.
        self._state.set("settling", job_id=job.job_id, phase="stage")
        manifest = self._storage.read_manifest(job.job_id)
        self._state.set("settling", job_id=job.job_id)
        if manifest is None:
            return None
        _check_same_request(manifest, job)
        log.info("job_already_done", redelivered=delivery.redelivered)
        self._measurements.job_repeated()
        return self._settlement.publish(
            delivery, lambda: self._reporter.terminal("succeeded", job, {"result": manifest["result"]})
        )

    def _finish(self, generated: Generated) -> None:
        job, delivery = generated.job, generated.delivery
        with bound_contextvars(job_id=job.job_id, attempt=job.attempt):
            try:
                self._settlement.settle(job, delivery, lambda: self._commit(generated))
            except Exception:
                # The delivery stays unacked, so the broker redelivers it when this connection ends.
                log.exception("finishing_failed")
                self._settlement.requeue(delivery)
            finally:
                self._state.finishing(None)

    def _commit(self, generated: Generated) -> bool:
        job, delivery = generated.job, generated.delivery
        write = self._settlement.in_place(job, self._config.limits.io_attempts, cancellable=False)
        begun = time.monotonic()
        manifest = write(self._write, generated, begun)
        self._measurements.phase("finish", time.monotonic() - begun)
        self._state.finishing(job.job_id)  # the broker may be away for as long as it likes
        _check_same_request(manifest, job)
        confirmed = self._settlement.publish(
            delivery, lambda: self._reporter.terminal("succeeded", job, {"result": manifest["result"]})
        )
        if confirmed:
            self._state.succeeded()
            self._measurements.job_ended("succeeded")
            self._measurements.job_seconds(time.monotonic() - generated.accepted_at)
            log.info("job_succeeded", video=manifest["result"]["video"]["path"], **manifest["result"]["timings"])
        return confirmed

    def _write(self, generated: Generated, begun: float) -> dict[str, Any]:
        """Writes video and manifest. Returns the manifest that counts: an earlier one, if there is one."""
        job, plan = generated.job, generated.plan

        def progress() -> None:
            size = f"{plan.width}x{plan.height}x{plan.num_frames}"
            self._state.finishing(job.job_id, phase="finish", work=size)

        def pixels() -> Iterator[Any]:
            for frame in generated.frames:
                progress()
                yield frame.numpy()

        progress()
        with self._storage.temporary_video(job.job_id) as temporary:
            count = encode_video(
                pixels(),
                temporary,
                width=plan.width,
                height=plan.height,
                fps=generated.draft.fps,
                crf=self._config.output.crf,
            )
            progress()
            stored = self._storage.keep_video(job.job_id, temporary)
        video = {
            "path": str(stored.path),
            "uri": stored.path.as_uri(),
            "sha256": stored.sha256,
            "bytes": stored.bytes,
            "width": plan.width,
            "height": plan.height,
            "num_frames": count,
            "fps": generated.draft.fps,
            "codec": CODEC,
        }
        manifest = {
            "schema": "reeld.manifest/1",
            "job_id": job.job_id,
            "request_digest": job.request_digest,
            "finished_at": now(),
            "worker_id": self._config.worker_id,
            "result": {
                "video": video,
                "plan": _told(plan, generated.draft),
                "timings": {**generated.timings, "finish_seconds": round(time.monotonic() - begun, 3)},
                "manifest": str(self._storage.manifest_path(job.job_id)),
            },
        }
        progress()
        counted = self._storage.create_manifest(job.job_id, manifest)
        if counted["result"]["video"]["sha256"] != stored.sha256:
            stored.path.unlink(missing_ok=True)  # another daemon was first, with other frames
        return counted


def _told(plan: GenerationPlan, draft: Draft) -> dict[str, Any]:
    """The plan for its publisher, by the names of a job's parameters.

    What its task or model does not take is not there, nor are prompts, which may be anybody's secret.
    """
    of_task = {name: value for name in TASK_PARAMETERS if (value := getattr(plan, name)) is not None}
    of_model = {"switch_DiT_boundary": plan.switch_boundary} if draft.switches_experts else {}
    common = {name: getattr(plan, name) for name in _ASKED}
    return {**common, **of_task, **of_model, "loras": [_named(each) for each in plan.loras]}


def _named(lora: LoraPlan) -> dict[str, Any]:
    return {"name": lora.name, "strength": lora.strength, "target": lora.target}


def _check_same_request(manifest: dict[str, Any], job: Job) -> None:
    if manifest["request_digest"] != job.request_digest:
        raise PermanentJobError(
            ErrorCode.JOB_ID_CONFLICT, "another request was already made under this job_id", path="job_id"
        )
