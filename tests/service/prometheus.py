"""A private Prometheus of the distribution, on loopback."""

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests.service.tools import ROOT, tool

RULES = ROOT / "systemd/prometheus/reeld.rules.yml"


class Prometheus:
    """A private Prometheus that scrapes one worker every second and evaluates our rules."""

    def __init__(self, folder: Path, target: str) -> None:
        folder.mkdir()
        config = folder / "prometheus.yml"
        config.write_text(
            f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{RULES}"]
scrape_configs:
  - job_name: reeld
    static_configs: [{{targets: ["{target}"]}}]
"""
        )
        self._log = (folder / "log").open("w+b")
        self._process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
                "--log.format=json",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self.url = f"http://{self._address(Path(self._log.name))}"
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def _address(self, log: Path) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for line in log.read_text().splitlines():
                record = json.loads(line)
                if record.get("msg") == "Listening on":
                    return str(record["address"])
            assert self._process.poll() is None, log.read_text()
            time.sleep(0.1)  # a growing file offers no event to wait for
        raise AssertionError(log.read_text())

    def _wait_ready(self, timeout: float = 60) -> None:
        """It listens before its storage is open, and answers every question with 503 until then."""
        deadline = time.monotonic() + timeout
        while not self._is_ready():
            assert time.monotonic() < deadline, Path(self._log.name).read_text()
            time.sleep(0.1)  # only its answer says so

    def _is_ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/-/ready", timeout=30).close()
        except urllib.error.HTTPError as error:
            with error:
                return False
        return True

    def ask(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("/api/v1/query", query=expression)["result"]
        return found

    def wait(self, expression: str, timeout: float = 60) -> list[dict[str, Any]]:
        """The first answer that is not empty."""
        deadline = time.monotonic() + timeout
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, f"no data: {expression}"
            time.sleep(0.3)  # the next scrape is no event of ours
        return found

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()
