"""A mock W&B server on loopback, with the part of its API that sweeps, agents and runs use.

It answers GraphQL at /graphql. A run posts its history and exit code to
/files/<entity>/<project>/<run>/file_stream, and puts its files at /upload/<owner>/<name>, where the
owner is the run or an artifact. Everything received is stored as plain Python values.
"""

import gzip
import itertools
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import quote, unquote

import yaml

ENTITY, SWEEP, AGENT = "someone", "grid1", "agent1"


@dataclass
class WandbRun:
    """A run: the settings that the sweep gave it, and what it reported."""

    sweep_settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None  # None while the run has not reported its end
    files: dict[str, bytes] = field(default_factory=dict)  # of the run, such as tables


@dataclass
class WandbArtifact:
    """An artifact of a run: its files, and whether it is complete."""

    name: str
    kind: str
    files: dict[str, bytes] = field(default_factory=dict)
    is_committed: bool = False


class WandbServer:
    """A server for one sweep and its runs; as a context manager it listens at `url`.

    Args:
        fixed: settings of every job besides the parameters of the sweep.
        more_jobs: settings of jobs that follow the grid.
        trouble: response to the history that runs send: "error" is status 500, "silence" is none
            until the server closes.
        at_most: number of grid points to hand out; None means all.
    """

    def __init__(
        self,
        fixed: dict[str, Any] | None = None,
        more_jobs: list[dict[str, Any]] | None = None,
        trouble: Literal["error", "silence"] | None = None,
        at_most: int | None = None,
    ) -> None:
        self.trouble, self.n_troubled = trouble, 0
        self._closed = threading.Event()
        self.fixed, self.more_jobs, self.at_most = fixed or {}, more_jobs or [], at_most
        self.sweep: dict[str, Any] = {}
        self.waiting: list[dict[str, Any]] = []
        self.runs: dict[str, WandbRun] = {}
        self.artifacts: dict[str, WandbArtifact] = {}  # by id
        self.n_requests = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if server.trouble and self.path != "/graphql":
                    server.n_troubled += 1
                    if server.trouble == "silence":
                        server._closed.wait()
                    self.send_error(500)
                    return
                with server._lock:
                    server.n_requests += 1
                    answer = json.dumps(server.answer(self.path, json.loads(body))).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_PUT(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                _, _, owner, name = unquote(self.path).split("/", 3)
                with server._lock:
                    owners: dict[str, Any] = {**server.runs, **server.artifacts}
                    owners[owner].files[name] = content
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

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
        """Return the JSON answer to a request."""
        if path != "/graphql":
            run = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)
            assert run, path
            self._file_stream(self.runs[run[1]], body)
            return {}
        operation = re.match(r"\s*(?:query|mutation)\s+(\w+)", body["query"])
        method = getattr(self, f"_{operation[1]}", None) if operation else None
        if method is None:  # the answer of a server that is older than its client
            return {"errors": [{"message": "Cannot query this field"}]}
        return {"data": method(body.get("variables") or {})}

    def _file_stream(self, run: WandbRun, body: dict[str, Any]) -> None:
        for name, chunk in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.history += map(json.loads, chunk["content"])
            if name == "wandb-summary.json":
                run.summary |= json.loads(chunk["content"][-1])
        if body.get("complete"):
            run.exit_code = body["exitcode"]

    # Each GraphQL operation has a method of its name.

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
        points = [dict(zip(names, point, strict=True)) for point in grid]
        self.waiting = points[: self.at_most] + self.more_jobs
        project = _project(sent["projectName"])
        return {
            "upsertSweep": {
                "sweep": {"name": SWEEP, "project": project},
                "configValidationWarnings": [],
            }
        }

    def _SweepWithRuns(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        sweep = {"id": SWEEP, "name": SWEEP, "config": yaml.safe_dump(self.sweep)}
        return {"project": {"sweep": {**sweep, "runs": {"edges": []}}}}

    def _CreateAgent(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"createAgent": {"agent": {"id": AGENT}}}

    def _Heartbeat(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        commands: list[dict[str, Any]] = []
        if not json.loads(sent["runState"]):  # the agent is idle
            commands = [self._next_job()] if self.waiting else [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": AGENT}, "commands": json.dumps(commands)}}

    def _next_job(self) -> dict[str, Any]:
        job = {**self.waiting.pop(0), **self.fixed}
        name = f"run{len(self.runs)}"
        self.runs[name] = WandbRun(job)
        settings = {key: {"value": value} for key, value in job.items()}
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
        run = self.runs.setdefault(sent["name"], WandbRun())  # new if it is not of a sweep
        config = json.loads(sent["config"] or "{}")
        run.config |= {key: entry["value"] for key, entry in config.items()}
        bucket = {
            "id": sent["name"], "name": sent["name"], "displayName": sent["displayName"],
            "sweepName": sent["sweep"], "historyLineCount": 0, "project": _project(sent["project"]),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _CreateRunFiles(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        files = [self._place(sent["run"], name) for name in sent["files"]]
        return {"createRunFiles": {"runID": sent["run"], "uploadHeaders": [], "files": files}}

    def _place(self, owner: str, name: str) -> dict[str, Any]:
        """Return where a client must upload a file of a run or of an artifact."""
        url = f"{self.url}/upload/{owner}/{quote(name, safe='')}"
        return {"id": name, "name": name, "uploadUrl": url, "uploadHeaders": []}

    def _CreateArtifact(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given, name = sent["input"], f"artifact{len(self.artifacts)}"
        artifact = WandbArtifact(given["artifactCollectionName"], given["artifactTypeName"])
        self.artifacts[name] = artifact
        sequence = {"latestArtifact": None}
        answer = {"id": name, "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": answer}}

    def _CreateArtifactManifest(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        given = sent.get("input") or sent
        file = self._place(given["artifactID"], "manifest")
        return {"createArtifactManifest": {"artifactManifest": {"id": "1", "file": file}}}

    def _CreateArtifactFiles(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        nodes = [
            {
                **self._place(spec["artifactID"], spec["name"]),
                "displayName": spec["name"], "storagePath": spec["name"],
                "uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]},
            }
            for spec in sent["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = (sent.get("input") or sent)["artifactID"]
        self.artifacts[name].is_committed = True
        return {"commitArtifact": {"artifact": {"id": name, "digest": "1"}}}


def _project(name: str) -> dict[str, Any]:
    return {"id": "1", "name": name, "entity": {"id": "1", "name": ENTITY}}
