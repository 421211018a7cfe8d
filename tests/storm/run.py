"""A storm from beginning to end: a broker, a proxy, daemons, jobs and faults, and the verdict.

Owns the order of things. Evidence is recorded as it comes; the final state is taken when every daemon has drained.
"""

import contextlib
import math
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from daemon.config import load_config
from daemon.connection import connect
from daemon.topology import apply_topology, topology_of
from tests.checker import check_folder
from tests.history import Recorder, Run, record_output, record_queues
from tests.node import Node
from tests.proxy import Proxy
from tests.storm.ends import Listener, Publisher, declare_events_queue
from tests.storm.faults import Faults
from tests.storm.fleet import Daemon, make_daemon
from tests.storm.report import Observed, report
from tests.storm.schedule import Schedule, StormFault, draw_schedule
from tests.verdict import Verdict
from tests.wire import Tap

_TICK_SECONDS = 0.2
_AHEAD = 8  # jobs that are published and have not ended
_BEYOND = 100  # jobs that are published beyond those after which the next fault comes
_STUCK_SECONDS = 240.0  # without any job's end; more than a restart of everything takes on a slow machine


class Storm:
    """One storm in `folder`. `say` gets a line now and then. After `minutes` no more jobs and faults come."""

    def __init__(
        self,
        folder: Path,
        models: Path,
        *,
        seed: int,
        jobs: int,
        faults: int,
        ranks: tuple[int, ...],
        say: Callable[[str], None],
        minutes: float = math.inf,
    ) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True)
        image = self.folder / "first.png"
        Image.new("RGB", (64, 32), "teal").save(image)
        self.schedule: Schedule = draw_schedule(
            seed, jobs=jobs, faults=faults, daemons=len(ranks), image=image.as_uri()
        )
        self._models, self._ranks, self._say = models, ranks, say
        self._fault_seconds = minutes * 60
        self.observed = Observed()
        self._daemons: list[Daemon] = []
        self._checks: list[Callable[[], None]] = []

    def run(self) -> Verdict:
        """Runs the storm, writes `report.md`, and returns the verdict."""
        for line in self.schedule.lines():
            self._say(line)
        title = f"storm of seed {self.schedule.seed}"
        recorder = Recorder(self.folder, Run(title=title))
        tap = Tap(recorder, self.folder / "output")
        begun = time.monotonic()
        node = Node(self.folder / "broker")
        with node, Proxy(node.amqp_port, observe=tap.see) as proxy:
            version = node.ctl("version").strip()
            try:
                self._storm(node, proxy, recorder)
                assert tap.fault is None, f"the tap failed: {tap.fault!r}"
            finally:
                for daemon in self._daemons:
                    daemon.end()
                self.observed.starts = sum(daemon.starts for daemon in self._daemons)
            record_output(recorder, self.folder / "output")
            delays = [f"reeld.jobs.test.retry.{delay}s" for delay in (1, 2, 4)]
            others = ["reeld.jobs.test", *delays, "reeld.unrouted"]
            record_queues(recorder, node.amqp_url, dead="reeld.jobs.test.dead", others=others)
        recorder.close()
        self.observed.seconds = time.monotonic() - begun
        verdict = check_folder(self.folder)
        self._report(verdict, version)
        return verdict

    def _report(self, verdict: Verdict, broker: str) -> None:
        daemons = " and ".join(f"{count} rank{'s' if count > 1 else ''}" for count in self._ranks)
        page = report(self.schedule, self.observed, verdict, daemons=daemons, broker=broker)
        (self.folder / "report.md").write_text(page)

    def _storm(self, node: Node, proxy: Proxy, recorder: Recorder) -> None:
        url = proxy.through(node.amqp_url)
        self._daemons += [
            make_daemon(self.folder, self._models, url, number=number, ranks=ranks)
            for number, ranks in enumerate(self._ranks)
        ]
        self._apply_topology(node, self.folder / "daemon-0" / "reeld.toml")
        declare_events_queue(node.amqp_url)
        node.settle_declared()

        def on_event(job_id: str, name: str, event: dict[str, Any]) -> None:
            publisher.on_event(job_id, name, event)

        listener = Listener(node.amqp_url, recorder, on_event)
        publisher = Publisher(node.amqp_url, recorder, self.schedule.jobs, ahead=_AHEAD, ended=lambda: listener.ended())
        self._checks += [lambda: _raise(listener.thread.failure), lambda: _raise(publisher.thread.failure)]
        listener.thread.start()
        publisher.thread.start()
        faults = Faults(node, proxy, self._daemons, recorder, cancel=publisher.cancel, wait=self._wait)
        self.observed.unnoticed = faults.unnoticed
        try:
            self._blow(faults, publisher, listener, node)
            self._until_all_ended(publisher, listener, node)
        except _Stuck as error:
            self.observed.broken_off = str(error)
            self._say(str(error))
        for daemon in self._daemons:
            status = daemon.stop(timeout_seconds=120)
            assert status in (0, None), f"{daemon.worker_id} drained with {status}"
        publisher.stop()
        listener.stop()
        self.observed.cancels = publisher.cancels
        for check in self._checks:
            check()

    def _apply_topology(self, node: Node, config_path: Path) -> None:
        config = load_config(config_path)
        broker = config.broker.model_copy(update={"url": node.amqp_url})
        with contextlib.closing(connect(broker, name="storm")) as connection:
            assert apply_topology(connection, topology_of(config)) == []

    def _blow(self, faults: Faults, publisher: Publisher, listener: Listener, node: Node) -> None:
        """What happens while the jobs run: here, one fault after another."""
        begun = time.monotonic()
        for number, fault in enumerate(self.schedule.faults):
            if time.monotonic() - begun > self._fault_seconds:
                self.observed.broken_off = f"time was up after {number} faults; no more jobs were published"
                publisher.finish()
                return
            publisher.allow(fault.after_jobs + _BEYOND)
            self._progress_to(fault.after_jobs, listener)
            self._do(fault, faults, publisher, listener)
            if number % 20 == 19:
                minutes = (time.monotonic() - begun) / 60
                self._say(f"{number + 1} faults, {listener.ended()} jobs ended, {minutes:.1f} minutes")
        publisher.allow(len(self.schedule.jobs))

    def _do(self, fault: StormFault, faults: Faults, publisher: Publisher, listener: Listener) -> None:
        begun = time.monotonic()
        met = faults.do(fault)
        (self.observed.met if met else self.observed.missed)[fault.kind] += 1
        if not met or fault.kind == "unknown job cancelled":
            return
        # How long until work goes on, counted from the fault itself, or from its end where it lasts.
        since = time.monotonic() if fault.seconds else begun
        self._wait(60, lambda: any(at > since for at, _ in listener.started[-20:]) or publisher.waiting() == 0)
        after = [at for at, _ in listener.started if at > since]
        if after:
            self.observed.recoveries[fault.kind].append(after[0] - since)

    def _progress_to(self, jobs: int, listener: Listener) -> None:
        """Until so many jobs have ended; those without an id count from the schedule."""
        silent = sum(job.job_id is None for job in self.schedule.jobs[:jobs])
        last, at = -1, time.monotonic()
        while (ended := listener.ended()) < jobs - silent - 1:
            if ended != last:
                last, at = ended, time.monotonic()
            if time.monotonic() - at > _STUCK_SECONDS:
                raise _Stuck(f"no job ended within {_STUCK_SECONDS} s; {ended} of {len(self.schedule.jobs)} had")
            self._wait(_TICK_SECONDS, lambda: False)

    def _until_all_ended(self, publisher: Publisher, listener: Listener, node: Node) -> None:
        deadline = time.monotonic() + _STUCK_SECONDS
        left, empty_since = -1, None
        while True:
            now_left = sum(not listener.has_ended(job.job_id) for job in publisher.published if job.job_id)
            if now_left != left:
                left, deadline = now_left, time.monotonic() + _STUCK_SECONDS
            if left == 0 and publisher.done.is_set() and waiting(node) == 0:
                empty_since = empty_since or time.monotonic()
                if time.monotonic() - empty_since > 8:  # the broker's own counts are up to 5 s old
                    return
            else:
                empty_since = None
            if time.monotonic() > deadline:
                raise _Stuck(f"{left} jobs have not ended, {waiting(node)} messages wait")
            self._wait(1, lambda: False)

    def _wait(self, seconds: float, until: Callable[[], bool]) -> None:
        """Lets time pass, and keeps the daemons running."""
        deadline = time.monotonic() + seconds
        while not until():
            for daemon in self._daemons:
                daemon.keep()
            for check in self._checks:
                check()
            left = deadline - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(_TICK_SECONDS, left))


class _Stuck(Exception):  # noqa: N818  a finding, not a failure of the storm
    """Raised when no job ends any more."""


def waiting(node: Node) -> int:
    """How many messages are in the queues of jobs, held by a daemon or not, as far as the broker has counted."""
    try:
        queues = node.api("GET", "/queues/%2F")
    except (OSError, urllib.error.HTTPError):
        return -1
    return sum(
        each.get("messages", 1)
        for each in queues
        if each["name"].startswith("reeld.jobs.test") and not each["name"].endswith(".dead")
    )


def _raise(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure
