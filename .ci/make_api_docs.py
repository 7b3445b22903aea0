#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make static/openapi.json and static/asyncapi.json: `.ci/make_api_docs.py`, after a change of a route or an answer.

Paths, names, summaries and methods come from the module's ROUTES; parameters and shapes from the tables below.  The
tests hold both documents against ROUTES, real answers and real messages.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aiperf_api  # noqa: E402  (the module beside `.ci/`, not an installed one)

TITLE = "aiperf-api"
DESCRIPTION = (
    "Watch an AIPerf benchmark over its ZMQ event bus: its metrics and progress over HTTP, WebSocket and Prometheus, on"
    " one port. JSON is UTF-8 and compact; every JSON answer is indented with `?pretty`. An error is"
    ' `{"error": "…"}` with its status.'
)
# The groups of the documentation page, in its order.
TAGS = {
    "everyday": "What most people need.",
    "streams": "Messages as they come off the bus.",
    "more": "Single runs, the server itself, documents.",
}
# path: tag, media types, shape of the JSON answer, parameters, statuses beyond those that any request may meet.
# `json` stands for application/json, FILES for STATIC_MEDIA.
ROUTE_DETAILS = """
/dashboard           everyday  text/html               -            -                          404
/top                 everyday  text/plain              -            -                          -
/api/status          everyday  json                    Status       -                          -
/api/progress        everyday  json                    Progress     -                          -
/api/metrics         everyday  json                    Metrics      -                          -
/api/results         everyday  json                    Results      -                          -
/api/history         everyday  json                    HistoryOverview,History tag,stat,since,points 404
/metrics             everyday  text/plain,application/openmetrics-text - -                     -
/report.html         everyday  text/html               -            -                          404
/ws                  streams   -                       -            -                          426
/api/stream          streams   text/event-stream,application/x-ndjson - types,format,snapshot -
/api/runs            more      json                    Runs         -                          -
/api/runs/{n}        more      json                    RunWhole     n                          404
/api/workers         more      json                    Workers      -                          -
/api/config          more      json                    Config       -                          -
/api/server-metrics  more      json                    ServerMetrics -                         -
/api/clients         more      json                    Clients      -                          -
/api                 more      json                    Index        -                          -
/                    more      text/html               -            -                          404
/openapi.json        more      json                    any          -                          404
/asyncapi.json       more      json                    any          -                          404
/health              more      text/plain              -            -                          -
/healthz             more      text/plain              -            -                          -
/readyz              more      text/plain              -            -                          -
/static/{file}       more      FILES                   -            file                       404
"""
STATIC_MEDIA = (
    "text/html,text/css,text/javascript,application/json,image/svg+xml,text/markdown,text/plain,application/gzip"
)
# name: where, example, schema, description.
PARAMETERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "tag": ("query", "request_latency", {}, "tags of metrics, separated by commas; repeatable"),
    "stat": ("query", "p99", {}, "statistics, such as avg, p50 or p99, separated by commas; repeatable"),
    "since": ("query", "", {"pattern": "^[0-9]{1,19}$"}, "only points later than this time, in ns since the epoch"),
    "points": ("query", "", {"pattern": "^[1-9][0-9]{0,3}$"}, "at most so many points; 1,000, up to 7,200"),
    "types": ("query", "realtime_metrics,worker_status_summary", {}, "message types, separated by commas; else all"),
    "format": ("query", "ndjson", {"enum": ["sse", "ndjson"]}, "sse or ndjson; else the Accept header says"),
    "snapshot": ("query", "", {"enum": ["0", "1"]}, "0: begin with the next message, not with the present state"),
    "n": ("path", "1", {"pattern": "^[1-9][0-9]{0,8}$"}, "number of the run, as /api/runs has it"),
    "file": ("path", "guides/protocol.md", {}, "path under static/; a folder's name with a slash lists it"),
    "pretty": ("query", "", {}, "indent the answer, for people; 0, no or false does not"),
}
ERROR_TEXTS = {
    400: "The request is malformed, or an argument has a value that it cannot have",
    401: "The token is missing or wrong",
    403: "The request comes from a page of another site",
    404: "There is nothing of that name",
    405: "The method is not one of this path",
    421: "The Host is not served here",
    426: "Only as a WebSocket",
    503: "Too many connections, or too much that others have not read; come back later",
}
ANY_ERRORS = (400, 403, 405, 421, 503)  # what any request may meet

# A shape a paragraph, a field a line: `Name  description`, `Name+` where there may be further fields; then
# `  field  type  description`, `field~` for one that may be missing.  Types: those of type_schema().
# `Name < Base` begins with the fields of Base.
ANSWER_SHAPES = """
Error  what went wrong
  error  string  what it was, and what to do about it
Index  where everything is
  version  string  of this server
  links  Link{}  by the name of the endpoint
Link+  an endpoint
  href  string  relative to /api, so that it holds behind a proxy under a path, too
  summary  string  what is there
Status+  the state of the run, and the source it is heard from
  state  string  waiting, then AIPerf's own states, and at the end complete, cancelled or failed
  run  integer  number of the run in this server's life, from 1
  label  string  which run this is, in words: run 2 of 3: concurrency_4
  phase  string?  name of the latest phase that has begun
  benchmark_id  string?
  profile_id  string?
  error  string?  why it failed or was cancelled
  stale  boolean  a running benchmark has been silent for 10 s
  started_ns  integer?  ns since the epoch
  elapsed_sec  number?  seconds that its phases have lasted
  source  Source
Source  where messages come from
  kind  string  tcp, ipc, zmq, bind, replay, demo, child or none
  address  string  of the bus; of a recording, the file's name alone
  backend  string  what speaks ZMQ: pyzmq, builtin, or nothing
  connected  boolean
  messages  integer  good ones so far
  last_message_age_sec  number?  seconds since the last one
Progress+  how far the run is; the top-level figures are of the profiling once it has begun, of the warm-up before
  total  integer?  requests; null for a run by duration
  completed  integer  requests that have ended, failed ones included
  errors  integer  requests that failed
  cancelled  integer  requests
  warmup  boolean  the figures are of the warm-up
  start_ns  integer?  ns since the epoch
  elapsed_ns  integer
  percent_complete  number  0 to 100; never goes back in a run
  eta_sec  number?  seconds left at the pace so far
  phase  string?  the latest of these that has begun
  phase_number  integer  how many of these have begun
  phase_percent  number  of the latest alone, 0 to 100
  phases  Phase{}  by name
  results_exported  boolean
  system_state  string?  as AIPerf calls it; after the end, the end it had
Phase+  a phase of the run; what AIPerf sends beyond this is passed on
  phase  string  warmup or profiling
  phase_name  string
  start_ns  integer?  ns since the epoch
  requests_end_ns  integer?  ns since the epoch
  total_expected_requests  integer?
  expected_duration_sec  number?
  requests_sent  integer
  requests_completed  integer
  requests_cancelled  integer
  request_errors  integer
  requests_in_flight  integer
  success_records  integer
  error_records  integer
  complete  boolean
  elapsed_ns  integer
  percent_complete  number
  eta_sec  number?
  requests_eta_sec  number?  the same, by the name of AIPerf's own API
  records_eta_sec  number?  until the last record is processed
  requests_per_second  number?
  records_per_second  number?
  last_update_ns  integer  ns since the epoch
Metrics+  the benchmark's metrics
  aiperf_version  string?
  benchmark_id  string?
  model  string?
  endpoint_type  string?
  streaming  boolean?
  concurrency  number?
  request_rate  number?
  final  boolean  these are the final results
  goodput  Goodput?  null unless the configuration has thresholds
  metrics  Row{}  by tag
  telemetry  Row{}  of the GPUs, by tag
Goodput  which requests are good ones, and how many
  thresholds  number{}  by tag
  share  number?  of the requests that succeeded, 0 to 1
Row+  a metric: those of its statistics that there are, in its unit
  header  string  its name for people
  unit  string
  avg~  number
  min~  number
  max~  number
  std~  number
  p1~  number
  p5~  number
  p10~  number
  p25~  number
  p50~  number
  p75~  number
  p90~  number
  p95~  number
  p99~  number
  count~  number
  sum~  number
  current~  number
Workers+  the workers
  total_workers  integer
  active_workers  integer  healthy, highly loaded, or with an error just now
  worker_statuses  string{}  by worker
  workers  Worker{}  by worker
  worker_groups  WorkerGroup{}  by group, where AIPerf has nodes report for theirs
Worker+  one worker
  worker_id~  string
  status  string  healthy, high_load, error, idle or stale
  startup_state  string?
  task_stats  object  requests: total, completed, failed
  processing_stats  object  records: success_records, error_records
  health  object?  cpu_usage in percent, memory_usage in bytes, ...
  last_update_ns  integer?  ns since the epoch
WorkerGroup+  the workers of a node, and its own sums
  workers  Worker{}  by worker
  last_update_ns  integer  ns since the epoch
Config+  the benchmark's configuration, with "***" for secrets
ServerMetrics+  the inference server's own metrics
  endpoint_summaries  object  by host:port
  message~  string  while there are none
Results  the end of the run
  status  running|complete|cancelled|failed  running also before the start
  results  object?  as AIPerf published them
  reason  string?  why it failed or was cancelled, or why results are not whole
  error_summary  ErrorSummary
ErrorSummary  why requests failed
  errors  RequestError[]  the most frequent ones, at most 100
  more  integer  kinds of error that are left out
RequestError  an error and how often it came
  code  integer?  HTTP status, where there was one
  type  string
  message  string
  count  integer
HistoryOverview  what there is a history of
  start_ns  integer?  ns since the epoch
  interval_sec  number  between two points
  points  integer  of each series
  tags  HistoryTag{}
  truncated~  LeftOut
LeftOut  what there was no room for
  tags  integer  so many tags
  stats  string[]  statistics of tags that have others
HistoryTag  a metric with a history
  unit  string
  header  string
  group  metrics|telemetry|server|phase
  stats  string[]
History  series over one time axis
  interval_sec  number
  times  integer[]  ns since the epoch
  series  HistorySeries[]
  truncated~  LeftOut
HistorySeries  a statistic of a metric
  tag  string
  stat  string
  unit  string
  header  string
  values  number?[]  one for each of `times`
Runs  the runs of this server's life, the last 100, newest last
  runs  Run[]
Run  a run, with the metrics that runs are compared by
  n  integer  its number, from 1
  label  string  which run this is, in words: run 2 of 3: concurrency_4
  of  integer?  how many the sweep has, where a configuration tells
  benchmark_id  string?
  model  string?
  endpoint_type  string?
  streaming  boolean?
  concurrency  number?
  request_rate  number?
  state  string
  error  string?
  started_ns  integer?  ns since the epoch
  ended_ns  integer?  ns since the epoch
  elapsed_sec  number?
  requests  integer
  errors  integer
  metrics  Row{}  by tag, with a few statistics each
RunWhole < Run  a run with all of its metrics; of the oldest only what /api/runs has
  metrics  Row{}  by tag
  telemetry~  Row{}  of the GPUs, by tag
  final~  boolean  these are the final results
  error_summary~  ErrorSummary
Clients  who is connected
  total  integer
  clients  StreamClient[]
StreamClient+  a WebSocket or a stream
  address  string
  kind  websocket|sse|ndjson
  subscriptions  string[]
  connected_ns  integer  ns since the epoch
  sent  integer  messages
  skipped  integer  messages
  waiting_bytes  integer
"""
MESSAGE_SHAPES = """
Subscribe+  receive messages of these types
  type  =subscribe
  message_types  string[]  names of message types, or "*" for all
  snapshot~  boolean  false: do not begin with the last message of each
Unsubscribe+  receive them no more
  type  =unsubscribe
  message_types  string[]
Ping+  ask for a sign of life
  type  =ping
Subscribed  as asked, in order
  type  =subscribed
  message_types  string[]
  unknown~  string[]  those that AIPerf has none of: perhaps a typo
Unsubscribed  as asked, in order
  type  =unsubscribed
  message_types  string[]
Pong  a sign of life
  type  =pong
ClientError  a message that could not be understood or done; the connection stays
  type  =error
  message  string
Skipped  what was dropped because this client did not keep up
  type  =skipped
  counts  integer{}  by message type
Unknown  first on a stream: asked types that AIPerf has none of, perhaps a typo
  type  =unknown
  message_types  string[]
RealtimeMetrics+  the metrics so far, in display units
  message_type  =realtime_metrics
  metrics  MetricRow[]
RealtimeTelemetryMetrics+  the GPUs
  message_type  =realtime_telemetry_metrics
  metrics  MetricRow[]
MetricRow+  a metric, with its statistics beside
  tag  string
  header~  string?
  unit~  string?
CreditPhaseStart+  a phase begins
  message_type  =credit_phase_start
CreditPhaseProgress+  how far a phase is
  message_type  =credit_phase_progress
CreditPhaseComplete+  a phase has ended
  message_type  =credit_phase_complete
WorkerStatusSummary+  the status of each worker
  message_type  =worker_status_summary
  worker_statuses  string{}
ProcessingStats+  records processed so far
  message_type  =processing_stats
AllRecordsReceived+  the last record has come
  message_type  =all_records_received
NewRun+  which run is told of from here on: from the second on, and of the first where a sweep is known
  message_type  =run
  run  integer  its number, from 1
  label  string  in words: run 2 of 3: concurrency_4
  of  integer?  how many the sweep has, where a configuration tells
BusMessage+  a message of any other type, as the bus has it
  message_type  string
"""
CLIENT_SAYS = ("Subscribe", "Unsubscribe", "Ping")
SERVER_ANSWERS = ("Subscribed", "Unsubscribed", "Pong", "ClientError", "Skipped")
PLAIN_TYPES = frozenset(("boolean", "integer", "number", "object", "string"))
SHAPE_LINE = re.compile(r"([A-Z]\w+)(\+?)(?: < (\w+))? +(.+)")
FIELD_LINE = re.compile(r"  (\w+)(~?) +(\S+)(?: +(.+))?")
# Open (no token asked for), or one of the two ways to present it.
SECURITY: list[dict[str, list[str]]] = [{}, {"bearer": []}, {"query": []}]
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "where the server was started with a token"},
    "query": {"type": "apiKey", "in": "query", "name": "token", "description": "the same, for browsers and WebSockets"},
}


def type_schema(text: str) -> dict[str, Any]:
    """JSON Schema of a type: `integer`; `Name` of a shape; `any`; `=word`; `a|b`; `T[]`; `T{}`, a map from names to T;
    `T?`, T or null; `T,U`, either.

    >>> type_schema("number?[]")
    {'type': 'array', 'items': {'type': ['number', 'null']}}
    """
    if "," in text:
        return {"anyOf": [type_schema(part) for part in text.split(",")]}
    if text.endswith("?"):
        schema = type_schema(text[:-1])
        return (
            {**schema, "type": [schema["type"], "null"]} if "type" in schema else {"anyOf": [schema, {"type": "null"}]}
        )
    if text.endswith("[]"):
        return {"type": "array", "items": type_schema(text[:-2])}
    if text.endswith("{}"):
        return {"type": "object", "additionalProperties": type_schema(text[:-2])}
    if text.startswith("="):
        return {"const": text[1:]}
    if "|" in text:
        return {"enum": text.split("|")}
    if text == "any":
        return {}
    return {"type": text} if text in PLAIN_TYPES else {"$ref": f"#/components/schemas/{text}"}


def read_shapes(text: str) -> dict[str, dict[str, Any]]:
    """JSON Schemas of a table of shapes."""
    shapes: dict[str, dict[str, Any]] = {}
    shape: dict[str, Any] = {}
    for line in text.strip().splitlines():
        head, field = SHAPE_LINE.fullmatch(line), FIELD_LINE.fullmatch(line)
        if head:
            name, is_open, base, words = head.groups()
            of: dict[str, Any] = shapes[base] if base else {"properties": {}, "required": []}
            shape = {"type": "object", "description": words}
            shape.update(properties={**of["properties"]}, required=[*of["required"]])
            shapes[name] = shape if is_open else {**shape, "additionalProperties": False}
        elif field:
            name, may_miss, kind, words = field.groups()
            schema = type_schema(kind)
            shape["properties"][name] = {**schema, "description": words} if words else schema
            shape["required"] += [] if may_miss or name in shape["required"] else [name]
        else:
            raise ValueError(f"neither a shape nor a field: {line}")
    return shapes


def parameter(name: str) -> dict[str, Any]:
    """A parameter as OpenAPI describes it."""
    place, example, schema, words = PARAMETERS[name]
    described = {"name": name, "in": place, "description": words, "required": place == "path"}
    empty = {"allowEmptyValue": True} if name == "pretty" else {}
    return {**described, **empty, "schema": {"type": "string", **schema}, **({"example": example} if example else {})}


def path_item(
    route: Any, tag: str, media: list[str], shape: str, names: list[str], errors: list[int]
) -> dict[str, Any]:
    """What OpenAPI says of a path."""
    media = ["application/json" if kind == "json" else kind for kind in media]
    if media == ["application/json"]:
        names = [*names, "pretty"]
    statuses = sorted({*ANY_ERRORS, *errors, *([401] if route.needs_token else [])})
    item: dict[str, Any] = (
        {"parameters": [{"$ref": f"#/components/parameters/{name}"} for name in names]} if names else {}
    )
    for method in route.methods:
        is_get = method == "GET"
        if route.path == "/ws":
            good = {"101": {"description": f"{route.summary}; /asyncapi.json describes its messages"}}
        else:
            kinds = {kind: {"schema": type_schema(shape) if shape != "-" else {"type": "string"}} for kind in media}
            answer = {"description": route.summary, **({"content": kinds} if is_get else {})}
            good = {"200": answer, "304": {"description": "As the client has it already: If-None-Match names its ETag"}}
        item[method.lower()] = {
            "operationId": route.name if is_get else f"{route.name}_head",
            "summary": route.summary if is_get else f"The head of GET {route.path}",
            "tags": [tag],
            "security": SECURITY if route.needs_token else [],
            "responses": {**good, **{str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}},
        }
    return item


def openapi() -> dict[str, Any]:
    """The HTTP API as an OpenAPI 3.1 document."""
    details = {
        row[0]: row[1:]
        for row in (line.split() for line in ROUTE_DETAILS.replace("FILES", STATIC_MEDIA).strip().splitlines())
    }
    routes = {route.path: route for route in aiperf_api.ROUTES}
    if routes.keys() != details.keys():
        raise ValueError(f"ROUTES and the table here differ in {sorted(routes.keys() ^ details.keys())}")
    items = {}
    for path, (tag, media, shape, names, errors) in details.items():
        listed = [[] if text == "-" else text.split(",") for text in (media, names, errors)]
        items[path] = path_item(routes[path], tag, listed[0], shape, listed[1], [int(error) for error in listed[2]])
    error_body = {"application/json": {"schema": type_schema("Error")}}
    responses: dict[str, Any] = {
        str(s): {"description": text, "content": error_body} for s, text in ERROR_TEXTS.items()
    }
    responses["503"]["content"] = {**error_body, "text/plain": {"schema": type_schema("string")}}  # of /readyz
    return {
        "openapi": "3.1.0",
        "info": {"title": TITLE, "version": aiperf_api.__version__, "description": DESCRIPTION},
        "servers": [{"url": "./", "description": "where this document was found, whatever stands before it"}],
        "tags": [{"name": name, "description": words} for name, words in TAGS.items()],
        "paths": items,
        "components": {
            "schemas": read_shapes(ANSWER_SHAPES),
            "parameters": {name: parameter(name) for name in PARAMETERS},
            "responses": responses,
            "securitySchemes": SCHEMES,
        },
    }


def message_list(channel: str, names: Iterable[str]) -> dict[str, Any]:
    """The messages of an operation of a channel."""
    messages = [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in names]
    return {"channel": {"$ref": f"#/channels/{channel}"}, "messages": messages}


def asyncapi() -> dict[str, Any]:
    """The messages of /ws and /api/stream as an AsyncAPI 3 document."""
    shapes = read_shapes(MESSAGE_SHAPES)
    bus = [name for name, shape in shapes.items() if "message_type" in shape["properties"]]
    stream = ("Subscribed", "Unknown", "Skipped", *bus)
    spoken = (*CLIENT_SAYS, *SERVER_ANSWERS, "Unknown", *bus)
    security = {"security": [{"$ref": "#/components/securitySchemes/bearer"}]}
    messages = {
        name: {
            "name": name,
            "summary": shapes[name]["description"],
            "payload": {"$ref": f"#/components/schemas/{name}"},
        }
        for name in spoken
    }
    told = {"websocket": (*CLIENT_SAYS, *SERVER_ANSWERS, *bus), "stream": stream}
    texts = {
        "websocket": ("/ws", "One JSON object a message, both ways; see guides/protocol.md"),
        "stream": ("/api/stream", "Server-Sent Events or NDJSON: an endless answer to a GET"),
    }
    channels = {
        channel: {
            "address": address,
            "description": text,
            "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in told[channel]},
        }
        for channel, (address, text) in texts.items()
    }
    names = {
        "builtin": """all_records_received credit_phase_complete credit_phase_progress credit_phase_start
            processing_stats realtime_metrics realtime_telemetry_metrics worker_status_summary""".split(),
        "known": sorted(aiperf_api.KNOWN_MESSAGE_TYPES),
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": TITLE,
            "version": aiperf_api.__version__,
            "description": DESCRIPTION.partition(". ")[0] + ".",
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": {
            "ask": {
                "action": "receive",
                **message_list("websocket", CLIENT_SAYS),
                "reply": message_list("websocket", SERVER_ANSWERS),
                **security,
            },
            "send": {"action": "send", **message_list("websocket", (*SERVER_ANSWERS, *bus)), **security},
            "stream": {"action": "send", **message_list("stream", stream), **security},
        },
        "components": {"messages": messages, "schemas": shapes, "securitySchemes": {"bearer": SCHEMES["bearer"]}},
        "x-message-types": names,
    }


def main() -> int:
    """Write both documents, or with `--check` only say whether they are as they would be written."""
    status = 0
    for name, document in (("openapi.json", openapi()), ("asyncapi.json", asyncapi())):
        path = ROOT / "static" / name
        text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
            print(f"{path}: {len(text)} bytes")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is not what .ci/make_api_docs.py makes", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
