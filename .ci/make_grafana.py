#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make static/grafana-dashboard.json: `.ci/make_grafana.py [OUTPUT]`.

The panels are described here in the words that matter (title, unit, queries, size); the JSON around them, which
Grafana wants the same for each, is written once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

OUTPUT = Path(__file__).resolve().parent.parent / "static" / "grafana-dashboard.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # the width of a Grafana dashboard
RUN = 'job=~"$job",instance=~"$instance",benchmark_id=~"$benchmark_id"'
TARGET = 'job=~"$job",instance=~"$instance"'
PLAIN = {"mode": "absolute", "steps": [{"color": "blue", "value": None}]}
BAD_FROM_ONE = {"mode": "absolute", "steps": [{"color": "green", "value": None}, {"color": "red", "value": 1}]}
NAME_AS_TEXT = {"options": {"textMode": "name", "colorMode": "none"}}


class Panel(NamedTuple):
    """One panel; `queries` are (legend, PromQL), with RUN or TARGET for the selectors that the variables fill."""

    title: str
    unit: str  # Grafana's name of the unit
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    note: str = ""  # shown behind the "i" of the panel
    options: Mapping[str, Any] = MappingProxyType({})  # "defaults" of the fields, "options" of the panel


def quantiles(metric: str, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the queries for p50, p90 and p99 of a summary."""
    found = [(f"p{round(q * 100)}", f'{metric}{{RUN,quantile="{q}"}}') for q in (0.5, 0.9, 0.99)]
    return (*found, *more)


def recent_mean(metric: str) -> tuple[str, str]:
    """Return the query for the mean of the last 30 s, from what a cumulative summary grew by."""
    return "mean of the last 30 s", f"rate({metric}_sum{{RUN}}[30s]) / rate({metric}_count{{RUN}}[30s])"


CUMULATIVE = "AIPerf's figures are cumulative since the phase began; what holds now is drawn beside them."
IN_FLIGHT = (
    "aiperf_phase_requests_sent_total{RUN} - aiperf_phase_requests_completed_total{RUN}"
    " - aiperf_phase_requests_cancelled_total{RUN}"
)
PER_GPU = "GPU {{gpu}} {{gpu_name}} {{source}}"
PER_ENDPOINT = "{{endpoint}} {{model_name}}"

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Run",
        (
            Panel("State", "none", (("{{state}}", "max by (state) (aiperf_benchmark_state{TARGET}) == 1"),),
                "stat", 4, 4, "AIPerf's own state, or how the run ended", NAME_AS_TEXT),
            Panel("Progress", "percentunit", (("progress", "aiperf_progress_ratio{RUN}"),), "gauge", 4, 4,
                options={"defaults": {"min": 0, "max": 1, "thresholds": PLAIN}}),
            Panel("Elapsed", "s", (("elapsed", "aiperf_elapsed_seconds{RUN}"),), "stat", 4, 4),
            Panel("Left", "s", (("left", "aiperf_eta_seconds{RUN}"),), "stat", 4, 4, "At the pace so far"),
            Panel("Completed", "short", (("{{phase}}", "aiperf_phase_requests_completed_total{RUN}"),), "stat", 4, 4),
            Panel("Silent", "bool_yes_no", (("silent", "aiperf_benchmark_stale{TARGET}"),), "stat", 4, 4,
                "A running benchmark that says nothing for 10 s was killed, or the network is gone",
                options={"defaults": {"thresholds": BAD_FROM_ONE}}),
            Panel("Requests", "short", (
                ("{{phase}} sent", "aiperf_phase_requests_sent_total{RUN}"),
                ("{{phase}} completed", "aiperf_phase_requests_completed_total{RUN}"),
                ("{{phase}} expected", "aiperf_phase_requests_expected{RUN}"),
            ), width=12),
            Panel("In flight", "short", (
                ("{{phase}}", IN_FLIGHT),
                ("effective concurrency", "aiperf_effective_concurrency_avg_requests{RUN}"),
            ), width=12),
        ),
    ),
    (
        "Throughput",
        (
            Panel("Output tokens per second", "short", (
                ("since the phase began", "aiperf_output_token_throughput_avg_tps{RUN}"),
                ("last 30 s", "rate(aiperf_output_sequence_length_tokens_sum{RUN}[30s])"),
            ), note=CUMULATIVE),
            Panel("Requests per second", "reqps", (
                ("since the phase began", "aiperf_request_throughput_avg_requests_per_sec{RUN}"),
                ("last 30 s", "rate(aiperf_request_latency_ms_count{RUN}[30s])"),
            ), note=CUMULATIVE),
            Panel("Output tokens per second and user", "short",
                quantiles("aiperf_output_token_throughput_per_user_tps_per_user")),
        ),
    ),
    (
        "Latency",
        (
            Panel("Request latency", "ms",
                quantiles("aiperf_request_latency_ms", recent_mean("aiperf_request_latency_ms")), note=CUMULATIVE),
            Panel("Time to first token", "ms",
                quantiles("aiperf_time_to_first_token_ms", recent_mean("aiperf_time_to_first_token_ms")),
                note=CUMULATIVE),
            Panel("Inter-token latency", "ms",
                quantiles("aiperf_inter_token_latency_ms", recent_mean("aiperf_inter_token_latency_ms")),
                note=CUMULATIVE),
        ),
    ),
    (
        "Errors and workers",
        (
            Panel("Error rate", "percent", (("since the phase began", "aiperf_request_error_rate_avg_percent{RUN}"),),
                note="Of the requests that were really completed"),
            Panel("Errors", "short", (
                ("{{phase}} errors", "aiperf_phase_requests_errors_total{RUN}"),
                ("{{phase}} cancelled", "aiperf_phase_requests_cancelled_total{RUN}"),
            )),
            Panel("Workers", "short", (("{{status}}", "sum by (status) (aiperf_workers{RUN})"),),
                note="A worker is `error` for 3 s after any failed request"),
            Panel("Worker CPU", "percent", (("{{worker}}", "aiperf_worker_cpu_percent{RUN}"),), width=12),
            Panel("Worker memory", "bytes", (("{{worker}}", "aiperf_worker_memory_bytes{RUN}"),), width=12),
        ),
    ),
    (
        "GPUs",
        (
            Panel("Power", "watt", ((PER_GPU, "aiperf_gpu_power_usage_current_w{RUN}"),), width=6),
            Panel("Utilisation", "percent", ((PER_GPU, "aiperf_gpu_utilization_current_percent{RUN}"),), width=6,
                options={"defaults": {"min": 0, "max": 100}}),
            Panel("Memory used", "decgbytes", ((PER_GPU, "aiperf_gpu_memory_used_current_gb{RUN}"),), width=6),
            Panel("Temperature", "celsius", ((PER_GPU, "aiperf_gpu_temperature_current_celsius{RUN}"),), width=6),
        ),
    ),
    (
        "Inference server (vLLM)",
        (
            Panel("Requests", "short", (
                ("running", "aiperf_num_running_current_req{RUN}"),
                ("waiting", "aiperf_num_waiting_current_req{RUN}"),
                ("preempted", "aiperf_num_preemptions_current_req{RUN}"),
            ), width=6),
            Panel("KV cache", "percent", (
                ("used", "aiperf_kv_cache_usage_pct_current_percent{RUN}"),
                ("prefix hits", "aiperf_prefix_cache_hit_rate_current_percent{RUN}"),
            ), width=6, options={"defaults": {"min": 0, "max": 100}}),
            Panel("Tokens per second", "short", (
                (f"prompt {PER_ENDPOINT}", "rate(aiperf_server_vllm_prompt_tokens_total{RUN}[30s])"),
                (f"generated {PER_ENDPOINT}", "rate(aiperf_server_vllm_generation_tokens_total{RUN}[30s])"),
            ), width=6),
            Panel("Time to first token, as the server sees it", "s", (
                (f"since the phase began {PER_ENDPOINT}", "aiperf_server_vllm_time_to_first_token_avg_seconds{RUN}"),
            ), width=6),
        ),
    ),
    (
        "This server",
        (
            Panel("Bus messages per second", "cps", (
                ("{{type}}", "rate(aiperf_api_bus_messages_total{TARGET}[30s])"),
            )),
            Panel("Clients", "short", (
                ("{{kind}}", "aiperf_api_clients{TARGET}"),
                ("connections", "aiperf_api_connections{TARGET}"),
            )),
            Panel("Messages per second", "cps", (
                ("sent", "rate(aiperf_api_messages_sent_total{TARGET}[30s])"),
                ("skipped for slow clients", "rate(aiperf_api_messages_skipped_total{TARGET}[30s])"),
            )),
            Panel("Requests per second", "reqps", (
                ("{{route}} {{status}}", "rate(aiperf_api_http_requests_total{TARGET}[30s])"),
            )),
            Panel("CPU", "percentunit", (("of one core", "rate(aiperf_api_process_cpu_seconds_total{TARGET}[30s])"),)),
            Panel("Memory", "bytes", (("resident", "aiperf_api_process_resident_memory_bytes{TARGET}"),)),
        ),
    ),
)  # fmt: skip


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
    defaults.update(panel.options.get("defaults", {}))
    options.update(panel.options.get("options", {}))
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.note,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
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
