"""A stand-in for W&B on loopback: as much of its API as `wandb sweep`, agents and runs ask for.

GraphQL is answered at /graphql; a run sends its history and its end to
/files/<entity>/<project>/<run>/file_stream. What was sent is kept, as plain Python values.
"""

import gzip
import itertools
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import yaml

ENTITY, SWEEP, AGENT = "someone", "grid1", "agent1"


@dataclass
class WandbRun:
    """One run: what the sweep asked of it, and what it told of itself."""

    asked: dict[str, Any] = field(default_factory=dict)  # settings from the sweep
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None  # None: still running, as far as W&B knows


class WandbServer:
    """Keeps one sweep and its runs. As a context manager it listens at `url` and stops again.

    Args:
        fixed: settings that every job gets beside the parameters of the sweep.
        more_jobs: settings of jobs that are dealt out after the grid.
        trouble: what happens to the history that runs send: it is refused with error 500, or gets
            no answer until the server is closed.
    """

    def __init__(
        self,
        fixed: dict[str, Any] | None = None,
        more_jobs: list[dict[str, Any]] | None = None,
        trouble: Literal["error", "silence"] | None = None,
    ) -> None:
        self.trouble, self.n_troubled = trouble, 0
        self._closed = threading.Event()
        self.fixed, self.more_jobs = fixed or {}, more_jobs or []
        self.sweep: dict[str, Any] = {}
        self.waiting: list[dict[str, Any]] = []
        self.runs: dict[str, WandbRun] = {}
        self.n_requests = 0
        self._lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if stand_in.trouble and self.path != "/graphql":
                    stand_in.n_troubled += 1
                    if stand_in.trouble == "silence":
                        stand_in._closed.wait()
                    self.send_error(500)
                    return
                with stand_in._lock:
                    stand_in.n_requests += 1
                    answer = json.dumps(stand_in.answer(self.path, json.loads(body))).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "WandbServer":
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to one request."""
        if path != "/graphql":
            run = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)
            assert run, path
            self._file_stream(self.runs[run[1]], body)
            return {}
        operation = re.match(r"\s*(?:query|mutation)\s+(\w+)", body["query"])
        known = getattr(self, f"_{operation[1]}", None) if operation else None
        if known is None:  # as a server answers that is older than its client
            return {"errors": [{"message": "Cannot query this field"}]}
        return {"data": known(body.get("variables") or {})}

    def _file_stream(self, run: WandbRun, body: dict[str, Any]) -> None:
        for name, chunk in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.history += map(json.loads, chunk["content"])
            if name == "wandb-summary.json":
                run.summary |= json.loads(chunk["content"][-1])
        if body.get("complete"):
            run.exit_code = body["exitcode"]

    # One method for each GraphQL operation, by its name.

    def _Viewer(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        teams = {"edges": []}
        return {
            "viewer": {
                "id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": teams
            }
        }  # fmt: skip

    def _ServerFeaturesQuery(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _UpsertSweep(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.sweep = yaml.safe_load(sent["config"])
        names = list(self.sweep["parameters"])
        grid = itertools.product(*(self.sweep["parameters"][name]["values"] for name in names))
        self.waiting = [dict(zip(names, point, strict=True)) for point in grid] + self.more_jobs
        project = _project(sent["projectName"])
        return {
            "upsertSweep": {
                "sweep": {"name": SWEEP, "project": project},
                "configValidationWarnings": [],
            }
        }

    def _SweepWithRuns(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        found = {"id": SWEEP, "name": SWEEP, "config": yaml.safe_dump(self.sweep)}
        return {"project": {"sweep": {**found, "runs": {"edges": []}}}}

    def _CreateAgent(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"createAgent": {"agent": {"id": AGENT}}}

    def _Heartbeat(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        commands: list[dict[str, Any]] = []
        if not json.loads(sent["runState"]):  # the agent is idle
            commands = [self._next_job()] if self.waiting else [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": AGENT}, "commands": json.dumps(commands)}}

    def _next_job(self) -> dict[str, Any]:
        asked = {**self.waiting.pop(0), **self.fixed}
        name = f"run{len(self.runs)}"
        self.runs[name] = WandbRun(asked)
        settings = {key: {"value": value} for key, value in asked.items()}
        return {"type": "run", "run_id": name, "program": self.sweep["program"], "args": settings}

    def _RunResumeStatus(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run, bucket = self.runs.get(sent["name"]), None
        if run is not None and run.history:
            config = {key: {"value": value} for key, value in run.config.items()}
            bucket = {
                "id": sent["name"], "name": sent["name"], "displayName": sent["name"],
                "summaryMetrics": json.dumps(run.summary), "config": json.dumps(config),
                "historyTail": json.dumps([json.dumps(run.history[-1])]), "eventsTail": "[]",
                "historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0,
                "tags": [], "notes": None, "wandbConfig": "{}",
            }  # fmt: skip
        return {"model": {**_project(sent["project"]), "bucket": bucket}}

    def _UpsertBucket(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.setdefault(sent["name"], WandbRun())  # a run of no sweep is new
        config = json.loads(sent["config"] or "{}")
        run.config |= {key: entry["value"] for key, entry in config.items()}
        bucket = {
            "id": sent["name"], "name": sent["name"], "displayName": sent["displayName"],
            "sweepName": sent["sweep"], "historyLineCount": 0, "project": _project(sent["project"]),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _CreateRunFiles(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"createRunFiles": {"runID": sent["run"], "uploadHeaders": [], "files": []}}


def _project(name: str) -> dict[str, Any]:
    return {"id": "1", "name": name, "entity": {"id": "1", "name": ENTITY}}
