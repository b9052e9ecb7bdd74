"""A server on loopback that the real W&B client takes for its own, and that can be told to fail, hang or die.

It answers what a run asks for: who am I, is this run known, make or update it, take its history, take its files.
"""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Service:
    """What arrived, kept over restarts of the server."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.calls, self.failing, self.code, self.pause = 0, False, 500, 0.0
        self.server: ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> None:
        """Serves on a free port, or again on the one it had."""
        handler = type("Bound", (Handler,), {"service": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def run(self, name: str) -> dict[str, Any]:
        fresh = {"config": {}, "history": [], "summary": {}, "files": {}, "resumes": 0, "exitcode": None}
        return self.runs.setdefault(name, fresh)

    def environment(self) -> dict[str, str]:
        """What makes a W&B client come here."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": "k" * 40, "WANDB_SILENT": "true"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: Service

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError, ValueError):
            self.close_connection = True

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def answer(self, value: Any, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        self.service.calls += 1
        if self.service.failing:
            time.sleep(self.service.pause)
            self.answer({"error": "as asked"}, self.service.code)
            return True
        return False

    def do_GET(self) -> None:
        if not self.refused():
            self.answer({})

    def do_PUT(self) -> None:
        data = self.body()
        if not self.refused():
            _, _, run, name = self.path.split("/", 3)
            self.service.run(run)["files"][name] = data
            self.answer({})

    def do_POST(self) -> None:
        data = self.body()
        if self.refused():
            return
        if self.path.endswith("/graphql"):
            self.answer({"data": self.graphql(json.loads(data))})
            return
        if self.path.endswith("/file_stream"):
            self.stream(self.path.split("/")[-2], json.loads(data))
        self.answer({})

    def graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        query, given = request.get("query", ""), request.get("variables") or {}
        owner = {"id": "p", "name": given.get("project") or "mae", "entity": {"id": "e", "name": "local"}}
        if "upsertBucket" in query:
            name = given.get("name") or given.get("id") or "run"
            known, run = name in self.service.runs, self.service.run(name)
            if given.get("config"):
                run["config"].update(json.loads(given["config"]))
            run.update({key: given[key] for key in ("groupName", "jobType", "tags", "notes") if given.get(key)})
            return {"upsertBucket": {"bucket": self.bucket(name, given, owner), "inserted": not known}}
        if "RunResumeStatus" in query:
            known = given.get("name") in self.service.runs
            if known:
                self.service.run(given["name"])["resumes"] += 1
            return {"model": {**owner, "bucket": self.bucket(given["name"], given, owner) if known else None}}
        if "reateRunFiles" in query:
            here = self.headers["Host"]
            files = [{"name": f, "uploadUrl": f"http://{here}/upload/{given['run']}/{f}"} for f in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if "viewer" in query or "serverInfo" in query:
            viewer = {"id": "u", "entity": "local", "username": "local", "flags": "{}", "teams": {"edges": []}}
            version = {"max_cli_version": "99.0.0", "min_cli_version": "0.10.0"}
            info = {"cliVersionInfo": version, "latestLocalVersionInfo": None, "features": []}
            return {"viewer": viewer, "serverInfo": info}
        return {}

    def bucket(self, name: str, given: dict[str, Any], owner: dict[str, Any]) -> dict[str, Any]:
        run = self.service.run(name)
        last = [json.dumps(run["history"][-1])] if run["history"] else []
        return {
            "id": name,
            "name": name,
            "displayName": given.get("displayName") or name,
            "description": "",
            "notes": "",
            "config": json.dumps(run["config"]),
            "wandbConfig": json.dumps({"t": 1}),
            "sweepName": None,
            "tags": [],
            "historyLineCount": len(run["history"]),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps(last),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(run["summary"]),
            "project": owner,
        }

    def stream(self, name: str, body: dict[str, Any]) -> None:
        run = self.service.run(name)
        for file, part in (body.get("files") or {}).items():
            lines = [json.loads(line) for line in part.get("content", []) if line.strip().startswith("{")]
            if file.endswith("history.jsonl"):
                del run["history"][int(part.get("offset", len(run["history"]))) :]
                run["history"] += lines
            elif file.endswith("summary.json"):
                for line in lines:
                    run["summary"].update(line)
        if body.get("complete"):
            run["exitcode"] = body.get("exitcode")


@contextmanager
def serving() -> Iterator[Service]:
    service = Service()
    service.start()
    try:
        yield service
    finally:
        service.failing = False
        service.stop()
