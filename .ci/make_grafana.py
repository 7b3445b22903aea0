#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make static/grafana-dashboard.json: `.ci/make_grafana.py [OUTPUT]`.

The panels are described here in the words that matter (title, unit, queries, size); the JSON around them, which
Grafana wants the same for each, is written once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

OUTPUT = Path(__file__).resolve().parent.parent / "static" / "grafana-dashboard.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # the width of a Grafana dashboard
RUN = 'job=~"$job",instance=~"$instance",benchmark_id=~"$benchmark_id"'
TARGET = 'job=~"$job",instance=~"$instance"'
STATES = ("waiting", "initializing", "configuring", "ready", "profiling", "processing", "stopping", "shutdown",
    "complete", "cancelled", "failed")  # fmt: skip


class Panel(NamedTuple):
    """One panel; `queries` are (legend, PromQL), with RUN or TARGET for the selectors that the variables fill."""

    title: str
    unit: str  # Grafana's name of the unit
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    note: str = ""  # shown behind the "i" of the panel
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to


def quantiles(metric: str, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the queries for p50, p90 and p99 of a summary."""
    found = [(f"p{round(q * 100)}", f'{metric}{{RUN,quantile="{q}"}}') for q in (0.5, 0.9, 0.99)]
    return (*found, *more)


def recent_mean(metric: str) -> tuple[str, str]:
    """Return the query for the mean of the last 30 s, from what a cumulative summary grew by."""
    return "mean of the last 30 s", f"rate({metric}_sum{{RUN}}[30s]) / rate({metric}_count{{RUN}}[30s])"


CUMULATIVE = "AIPerf's figures are cumulative since the phase began; what holds now is drawn beside them."
GPU = "GPU {{gpu}} {{gpu_name}} {{source}}"

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = ()


def grafana_panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """Return a panel as Grafana has it."""
    targets = [
        {
            "datasource": DATASOURCE,
            "expr": expression.replace("RUN", RUN).replace("TARGET", TARGET),
            "legendFormat": legend,
            "refId": chr(ord("A") + index),
        }
        for index, (legend, expression) in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": 15000}
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    elif panel.kind in {"stat", "gauge", "bargauge"}:
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    overrides = panel.options.get("overrides", [])
    defaults.update(panel.options.get("defaults", {}))
    options.update(panel.options.get("options", {}))
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.note,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": options,
        "targets": targets,
    }


def laid_out() -> list[dict[str, Any]]:
    """Return rows and panels, left to right and down."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS:
        row = {"type": "row", "title": title, "collapsed": False, "panels": [], "id": len(placed) + 1}
        placed.append({**row, "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}})
        x, y, tallest = 0, y + 1, 0
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            placed.append(grafana_panel(panel, len(placed) + 1, x, y))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return placed


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """Return a variable that takes the values of a label, all of them to begin with."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def dashboard() -> dict[str, Any]:
    """Return the whole dashboard, in the form of an export that asks for its data source."""
    datasource = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "__requires": [
            {"type": "grafana", "id": "grafana", "name": "Grafana", "version": "10.0.0"},
            {"type": "datasource", "id": "prometheus", "name": "Prometheus", "version": "1.0.0"},
        ],
        "uid": "aiperf-api",
        "title": "AIPerf",
        "description": "A benchmark as aiperf-api exports it",
        "tags": ["aiperf", "benchmark", "llm"],
        "schemaVersion": 38,
        "editable": True,
        "graphTooltip": 1,  # one crosshair in all panels
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {
            "list": [
                {**datasource, "current": {}, "refresh": 1},
                variable("job", "Job", "label_values(aiperf_info, job)"),
                variable("instance", "Instance", 'label_values(aiperf_info{job=~"$job"}, instance)'),
                variable("benchmark_id", "Benchmark", f"label_values(aiperf_info{{{TARGET}}}, benchmark_id)"),
            ]
        },
        "annotations": {"list": []},
        "panels": laid_out(),
    }


def main() -> int:
    """Write the dashboard."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    output.write_text(json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
