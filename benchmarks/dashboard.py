"""A picture of the dashboard's panels from a real run: a worker of two ranks, its broker, and a Prometheus.

Owns the run (jobs, a failed one, a broker that is away for a while, a rank that is killed) and
drawing what each panel's queries return. It is not Grafana's rendering: only the queries, titles, units and legends are
the dashboard's. Writes docs/images/dashboard.png; takes about two minutes.

    make dashboard-picture
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tests.harness import job, publish
from tests.service.prometheus import Prometheus
from tests.service.running import Service, running_service
from tests.service.tools import ROOT

DASHBOARD = ROOT / "systemd/grafana/reeld.json"
_COLOURS = ("#3b7dd8", "#e07b39", "#3a9d5d", "#b5466f", "#8a63c9", "#c0a02c", "#4aa7a7", "#7a7a7a")
_CELL, _ROW, _GAP = 45.0, 30.0, 8.0  # Grafana's grid is 24 cells wide
_LEGENDS = 6
_SCALE = 2
_STEP_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: list[tuple[float, float]]
    """Unix time in seconds, value."""


def run_service(service: Service) -> None:
    """About a minute and a half of what a worker meets."""
    for number in range(8):
        service.do(job(), timestamp=int(time.time()) - 3 * number)
    service.do(job(parameters={"num_frames": -1}))
    service.node.stop()
    service.wait_reason("/readyz", "consumer_disconnected")
    service.node.start()
    service.wait_ready()
    for _ in range(3):
        service.do(job(), timestamp=int(time.time()) - 5)
    long = job(parameters={"seed": 1, "num_frames": 9, "num_inference_steps": 150})
    publish(service.node.amqp_url, long, timestamp=int(time.time()))
    service.worker.wait_log("job_started", job_id=long["job_id"])
    os.kill(service.rank_pid(1), signal.SIGKILL)
    service.worker.wait_log("job_succeeded", job_id=long["job_id"], timeout=300)
    for _ in range(4):
        service.do(job(), timestamp=int(time.time()) - 8)


def ask(prometheus: Prometheus, target: dict[str, Any], *, begun: float, ended: float) -> list[Series]:
    """What a panel's query returns over the run."""
    expression = target["expr"].replace("$__rate_interval", "15s").replace("$instance", ".*")
    found = prometheus.ask(
        "/api/v1/query_range", query=expression, start=str(begun), end=str(ended), step=str(_STEP_SECONDS)
    )
    return [
        Series(
            _legend(target.get("legendFormat") or "", each["metric"]),
            [(float(at), float(value)) for at, value in each["values"] if math.isfinite(float(value))],
        )
        for each in found["result"]
    ]


def _legend(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda label: labels.get(label[1], ""), text).strip()


def draw(panels: list[tuple[dict[str, Any], list[Series]]], *, begun: float, ended: float, note: str) -> Image.Image:
    """All panels as one picture."""
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel, _ in panels) * _ROW + 30
    image = Image.new("RGB", (round(24 * _CELL * _SCALE), round(height * _SCALE)), "#f0f1f3")
    drawing = ImageDraw.Draw(image)
    for panel, series in panels:
        place = panel["gridPos"]
        box = _Pen(drawing, place["x"] * _CELL + _GAP / 2, place["y"] * _ROW + _GAP / 2)
        w, h = place["w"] * _CELL - _GAP, place["h"] * _ROW - _GAP
        box.rectangle(0, 0, w, h, "white")
        box.text(10, 8, panel["title"], size=12)
        if panel["type"] == "stat":
            _draw_stat(box, panel, series, w, h)
        else:
            _draw_chart(box, panel, series, w, h, begun, ended)
    _Pen(drawing, 0, 0).text(_GAP, height - 22, note, size=11, colour="#555555")
    return image


@dataclass(frozen=True, slots=True)
class _Pen:
    """Draws with its own origin, in units of the picture, which has `_SCALE` pixels for each."""

    drawing: ImageDraw.ImageDraw
    x: float
    y: float

    def rectangle(self, x: float, y: float, w: float, h: float, colour: str) -> None:
        self.drawing.rectangle((*self._pixel(x, y), *self._pixel(x + w, y + h)), fill=colour)

    def line(self, points: list[tuple[float, float]], colour: str, width: float) -> None:
        self.drawing.line([self._pixel(*point) for point in points], fill=colour, width=round(width * _SCALE))

    def text(self, x: float, y: float, text: str, *, size: int, anchor: str = "la", colour: str = "#222222") -> None:
        font = ImageFont.load_default(size * _SCALE)
        self.drawing.text(self._pixel(x, y), text, fill=colour, font=font, anchor=anchor)

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        return (self.x + x) * _SCALE, (self.y + y) * _SCALE


def _draw_stat(pen: _Pen, panel: dict[str, Any], series: list[Series], w: float, h: float) -> None:
    last = series[-1].points[-1][1] if series and series[-1].points else math.nan
    text = f"{last:.4g}"
    for mapping in panel["fieldConfig"]["defaults"]["mappings"]:
        text = mapping["options"].get(f"{last:g}", {}).get("text", text)
    if panel["options"]["textMode"] == "name":
        text = series[-1].name
    pen.text(w / 2, h * 0.6, text, size=30 if len(text) < 12 else 11, anchor="mm")


def _draw_chart(
    pen: _Pen, panel: dict[str, Any], series: list[Series], w: float, h: float, begun: float, ended: float
) -> None:
    custom = panel["fieldConfig"]["defaults"]
    unit = custom["unit"]
    shown = sorted((each for each in series if each.points), key=lambda each: -max(value for _, value in each.points))
    lines = _stack(shown) if custom["custom"]["stacking"]["mode"] == "normal" else shown
    legends = min(len(shown), _LEGENDS)
    left, top, right, bottom = 58.0, 34.0, w - 10, h - 12 - 13 * legends
    highest = max([value for each in lines for _, value in each.points] or [0.0]) or 1.0
    for part in (0.0, 0.5, 1.0):
        y = bottom - part * (bottom - top)
        pen.line([(left, y), (right, y)], "#e3e5e8", 1)
        pen.text(left - 5, y, _value(part * highest, unit), size=10, anchor="rm", colour="#555555")
    for number, each in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        # A query without an answer for a while leaves a gap.
        for piece in _pieces(each.points):
            points = [
                (left + (at - begun) / (ended - begun) * (right - left), bottom - value / highest * (bottom - top))
                for at, value in piece
            ]
            pen.line(points if len(points) > 1 else [*points, (points[0][0] + 1.5, points[0][1])], colour, 1.6)
        if number < _LEGENDS:
            y = h - 10 - 13 * (legends - 1 - number)
            pen.rectangle(12, y - 1.5, 9, 3, colour)
            more = f" and {len(shown) - _LEGENDS} more" if number == _LEGENDS - 1 and len(shown) > _LEGENDS else ""
            pen.text(26, y, f"{shown[number].name or panel['title']}{more}", size=10, anchor="lm", colour="#333333")


def _stack(series: list[Series]) -> list[Series]:
    total: dict[float, float] = {}
    stacked = []
    for each in series:
        for at, value in each.points:
            total[at] = total.get(at, 0.0) + value
        stacked.append(Series(each.name, [(at, total[at]) for at, _ in each.points]))
    return stacked


def _pieces(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = []
    for point in points:
        if not pieces or point[0] - pieces[-1][-1][0] > 2 * _STEP_SECONDS:
            pieces.append([])
        pieces[-1].append(point)
    return pieces


def _value(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"
    return f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images/dashboard.png")
    output: Path = parser.parse_args().output
    with tempfile.TemporaryDirectory(prefix="reeld-dashboard-") as name:
        folder = Path(name)
        script = "import sys; from pathlib import Path; from parallel.tiny import write_tiny_model; "
        script += "write_tiny_model(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", script, str(folder / "models")], check=True, capture_output=True)
        with running_service(folder / "models", folder) as service:
            prometheus = Prometheus(folder / "prometheus", service.url.removeprefix("http://"))
            try:
                prometheus.wait('up{job="reeld"} == 1')
                begun = time.time()
                run_service(service)
                time.sleep(3)  # the last scrapes
                ended = time.time()
                panels = [
                    (
                        panel,
                        [
                            each
                            for target in panel["targets"]
                            for each in ask(prometheus, target, begun=begun, ended=ended)
                        ],
                    )
                    for panel in json.loads(DASHBOARD.read_text())["panels"]
                ]
            finally:
                prometheus.stop()
    day = time.strftime("%Y-%m-%d", time.gmtime(begun))
    note = (
        f"{ended - begun:.0f} s of a tiny model on two CPU ranks, {day}: jobs, a broker that is stopped and started, a"
        " rank that is killed. Drawn by benchmarks/dashboard.py, not by Grafana."
    )
    picture = draw(panels, begun=begun, ended=ended, note=note)
    picture.quantize(64).save(output, format="PNG", optimize=True)  # flat colours: a quarter of the bytes
    print(f"{output}: {len(panels)} panels, {sum(not series for _, series in panels)} of them empty")


if __name__ == "__main__":
    main()
