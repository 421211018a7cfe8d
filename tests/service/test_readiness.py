"""Health under real faults: what /livez and /readyz of a worker of two ranks say, and why.

One worker serves all tests of the endpoint and of the logs; every test leaves it ready, but the last, which drains it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from daemon import client
from daemon.sections import BrokerConfig
from tests.harness import Worker, job, publish, write_config
from tests.service.running import TOPOLOGY, Service


def reeld_health(service: Service, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "reeld"), "health", "--url", service.url, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_loading_is_alive_and_not_ready(service: Service) -> None:
    """From its first moment the launcher answers: not ready with what it still does, then ready."""
    reasons = [{each["reason"] for each in answer["reasons"]} for answer in service.while_loading]
    assert reasons[-1] == set()
    assert {"starting", "loading"} <= set.union(*reasons)
    assert set.union(*reasons) <= {"starting", "loading", "consumer_disconnected", "publisher_disconnected"}
    service.wait_ready()
    assert service.verdict("/livez")["live"]
    done = reeld_health(service)
    assert (done.returncode, done.stdout) == (0, "ready\n")


def test_other_paths_and_a_dead_endpoint(service: Service) -> None:
    """What is not there is 404; where nobody answers, `reeld health` ends with 1 and says so."""
    assert service.get("/")[0] == 404
    command = [str(Path(sys.executable).parent / "reeld"), "health", "--url", "http://127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "127.0.0.1:1/readyz" in done.stderr


def test_a_port_that_is_taken(service: Service, models: Path, tmp_path: Path) -> None:
    """A second instance with the same port ends with 78 before it starts a rank, and says what to change."""
    config = write_config(tmp_path, models, nproc=1)
    config.write_text(config.read_text() + f'[metrics]\nlisten = "{service.url.removeprefix("http://")}"\n')
    worker = Worker(config, service.node.amqp_url, tmp_path)
    try:
        assert worker.process.wait(120) == 78
    finally:
        worker.end()
    (fatal,) = (line for line in worker.logs() if line["event"] == "fatal")
    assert "metrics.listen" in fatal["reason"]
    assert "a port of its own" in fatal["reason"]


def test_broker_stopped(service: Service) -> None:
    """Without its broker the worker is alive and not ready, and says which connection lacks it; then ready again."""
    service.wait_ready()
    service.node.stop()
    service.wait_reason("/readyz", "consumer_disconnected")
    assert "127.0.0.1" in service.wait_reason("/readyz", "publisher_disconnected")["message"]
    assert service.verdict("/livez")["live"]
    done = reeld_health(service)
    assert done.returncode == 1
    assert "consumer_disconnected: " in done.stdout
    assert reeld_health(service, "--live").returncode == 0
    service.node.start()
    service.wait_ready()
    assert service.do(job()) == "job_succeeded"
    for connection in ("consumer", "publisher"):
        assert service.metrics(connection=connection)["reeld_broker_reconnects_total"] >= 1


def test_queue_deleted(service: Service) -> None:
    """A job queue that was deleted makes it not ready, by its name; declared anew, it is ready again."""
    service.wait_ready()
    service.node.delete_queue("reeld.jobs.test")
    assert "reeld.jobs.test" in service.wait_reason("/readyz", "consumer_topology")["message"]
    assert service.verdict("/livez")["live"]
    assert client.apply_on(BrokerConfig(url=service.node.amqp_url), TOPOLOGY) == []
    service.wait_ready()


def test_memory_alarm(service: Service) -> None:
    """A broker that blocks publishers can be sent no result: not ready, with the broker's own reason."""
    service.wait_ready()
    service.node.raise_memory_alarm()
    assert service.wait_reason("/readyz", "publisher_blocked")["message"]
    service.node.clear_memory_alarm()
    service.wait_ready()


def test_a_rank_that_hangs(service: Service) -> None:
    """Rank 0 stopped by SIGSTOP: /livez still answers, says no and names it before the group is started again; then all
    is well, with the counters as they were."""
    service.wait_ready()
    before = service.metrics(code="", outcome="succeeded")["reeld_jobs_total"]
    old = service.rank_pid(0)
    begun = len(service.worker.lines())
    os.kill(old, signal.SIGSTOP)
    found = service.wait_reason("/livez", "rank_stalled")
    assert found["rank"] == 0
    assert "said nothing" in found["message"]
    service.worker.wait_log("group_killed", after=begun)
    service.wait_ready()
    assert service.verdict("/livez")["live"]
    assert service.rank_pid(0) != old
    assert not psutil.pid_exists(old)
    assert service.metrics(reason="stalled")["reeld_group_restarts_total"] == 1
    assert service.metrics(code="", outcome="succeeded")["reeld_jobs_total"] == before
    assert service.do(job()) == "job_succeeded"
    service.wait_verdict(
        "/readyz", lambda _: service.metrics(code="", outcome="succeeded")["reeld_jobs_total"] > before
    )


def test_draining(service: Service) -> None:
    """A worker that drains is alive and not ready until it is gone."""
    service.wait_ready()
    message: dict[str, Any] = job(parameters={"seed": 1, "num_frames": 9, "num_inference_steps": 150})
    publish(service.node.amqp_url, message)
    service.worker.wait_log("job_started", job_id=message["job_id"])
    service.worker.process.send_signal(signal.SIGTERM)
    service.wait_reason("/readyz", "draining")
    assert service.verdict("/livez")["live"]
    assert service.worker.process.wait(120) == 0, service.worker.tail()
