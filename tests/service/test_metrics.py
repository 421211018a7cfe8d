"""Metrics of a worker of two ranks, as promtool judges them and as a real Prometheus scrapes them."""

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import job, until
from tests.service.prometheus import RULES, Prometheus
from tests.service.running import Service
from tests.service.tools import ROOT, tool

DASHBOARD = ROOT / "systemd/grafana/reeld.json"


@pytest.fixture(scope="module")
def prometheus(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    service.wait_ready()
    running = Prometheus(tmp_path_factory.mktemp("prometheus") / "p", service.url.removeprefix("http://"))
    try:
        running.wait('up{job="reeld"} == 1')
        yield running
    finally:
        running.stop()


def test_names_and_texts_are_as_prometheus_wants_them(service: Service) -> None:
    """`promtool check metrics` finds nothing to say about the whole exposition."""
    status, body = service.get("/metrics")
    assert status == 200
    lint = subprocess.run([tool("promtool"), "check", "metrics"], input=body, capture_output=True, text=True)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_a_real_prometheus_sees_what_a_job_did(service: Service, prometheus: Prometheus) -> None:
    """A job that succeeds, one that is malformed and one that is repeated are each counted once, with their times."""
    had = service.metrics()
    accepted = service.metrics(redelivered="false")["reeld_jobs_accepted_total"]
    message = job()
    assert service.do(message, timestamp=int(time.time()) - 40) == "job_succeeded"
    # Told last, so a scrape that has it has the rest of this job.
    prometheus.wait(f"reeld_job_seconds_count == {had['reeld_job_seconds_count'] + 1}")

    def value(expression: str) -> float:
        (only,) = prometheus.wait(expression)
        return float(only["value"][1])

    assert value("reeld_job_queue_wait_seconds_sum / reeld_job_queue_wait_seconds_count") >= 40
    assert value("reeld_step_seconds_count") >= message["parameters"]["num_inference_steps"]
    phases = {each["metric"]["phase"] for each in prometheus.query("reeld_job_phase_seconds_count > 0")}
    assert phases == {"stage", "encode", "denoise", "decode", "finish"}
    # Of this job: an earlier one may have ended otherwise, which leaves phases without a job's seconds.
    parts = value("sum(reeld_job_phase_seconds_sum)") - had["reeld_job_phase_seconds_sum"]
    assert 0 < parts <= value("reeld_job_seconds_sum") - had["reeld_job_seconds_sum"] + 0.01
    assert value('reeld_jobs_accepted_total{redelivered="false"}') == accepted + 1
    assert value("reeld_publish_seconds_count") >= 1
    assert value("reeld_ack_seconds_count") >= 1
    memory = prometheus.query('reeld_rank_memory_bytes{kind="used"} > 1e8')
    assert {each["metric"]["rank"] for each in memory} == {"0", "1"}
    assert len(prometheus.query("reeld_model_load_seconds > 0")) == 2
    assert prometheus.query("reeld_build_info")[0]["metric"]["torch"]
    malformed = job(parameters={"num_frames": -1})
    failed = 'reeld_jobs_total{outcome="failed", code="malformed_job"}'
    failures = value(failed)
    assert service.do(malformed) == "job_malformed"
    prometheus.wait(f"{failed} == {failures + 1}")


def test_alert_rules_load_and_rest(prometheus: Prometheus) -> None:
    """The same Prometheus has loaded every rule; with a worker that works, none of them fails to evaluate or fires."""
    prometheus.wait("reeld_ready == 1")

    def evaluated() -> list[dict[str, Any]]:
        (group,) = prometheus.ask("/api/v1/rules")["groups"]
        rules: list[dict[str, Any]] = group["rules"]
        return [] if any(rule["health"] == "unknown" for rule in rules) else rules

    until(evaluated, timeout=60)
    rules = evaluated()
    assert {rule["health"] for rule in rules} == {"ok"}
    assert len(rules) == RULES.read_text().count("- alert:")
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_alert_rules_fire_when_they_should() -> None:
    """promtool: the rules are well-formed, and each alert is shown firing and not firing."""
    for command in (["check", "rules", RULES.name], ["test", "rules", "reeld.rules.test.yml"]):
        done = subprocess.run([tool("promtool"), *command], cwd=RULES.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    tests = RULES.with_name("reeld.rules.test.yml").read_text()
    for line in RULES.read_text().splitlines():
        name = line.partition("- alert: ")[2]
        if name:
            assert f"alertname: {name}\n        exp_alerts:\n          - " in tests, f"{name} is never shown firing"
            assert f"alertname: {name}, exp_alerts: []" in tests, f"{name} is never shown resting"


def test_every_query_of_the_dashboard_has_data(service: Service, prometheus: Prometheus) -> None:
    """Each panel's query, run as Grafana would after a job, gives data; rare faults may give 0 but not nothing."""
    assert service.do(job(), timestamp=int(time.time()) - 5) == "job_succeeded"
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(queries) > 15
    for title, expression in queries:
        filled = expression.replace("$__rate_interval", "1m").replace("$__range", "10m").replace("$instance", ".*")
        assert "$" not in filled, f"{title}: {expression}"
        assert prometheus.wait(filled), title
