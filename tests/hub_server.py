"""A server on loopback that huggingface_hub takes for the Hub: models are made, uploaded to, listed and downloaded."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_good"


class Hub:
    """Models by name, each a dict of files. `code` is answered to all where it is set."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.code: int | None = None
        self.requests: list[str] = []
        self.address = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, body: object, code: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refused(self, writes: bool, model: str | None = None) -> bool:
        self.hub.requests.append(f"{self.command} {self.path}")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.hub.code is not None:
            self.answer({"error": "as asked"}, self.hub.code)
        elif (writes or model in self.hub.private) and not known:
            error = {} if writes else {"X-Error-Code": "RepoNotFound"}
            self.answer({"error": "Invalid username or password."}, 401, error)
        elif model is not None and model not in self.hub.models:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            return False
        return True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refused(writes=True):
            return
        if self.path == "/api/validate-yaml":  # of a card's header
            self.answer({"errors": [], "warnings": []})
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.models.setdefault(name, {})
            self.answer({"url": f"{self.hub.address}/{name}", "name": name})
            return
        match = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
        assert match is not None, self.path
        if match[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            return
        for line in body.splitlines():
            if (change := json.loads(line))["key"] == "file":
                self.hub.models[match[1]][change["value"]["path"]] = base64.b64decode(change["value"]["content"])
        address = f"{self.hub.address}/{match[1]}/commit/{self.sha(match[1])}"
        self.answer({"success": True, "commitOid": self.sha(match[1]), "commitUrl": address})

    def sha(self, model: str) -> str:
        text = json.dumps(sorted((n, hashlib.sha1(f).hexdigest()) for n, f in self.hub.models[model].items()))
        return hashlib.sha1(text.encode()).hexdigest()

    def do_GET(self) -> None:
        match = re.match(r"/api/models/([^/]+/[^/?]+)(?:/(revision|tree)/([^/?]+))?", self.path)
        file = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path)
        model = match[1] if match else file[1] if file else None
        if self.refused(writes=False, model=model):
            return
        if model is None:
            self.answer({"error": "not here"}, 404)
            return
        files, sha = self.hub.models[model], self.sha(model)
        if match and match[3] not in (None, "main", sha):
            self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif match and match[2] == "tree":
            rows = [
                {"type": "file", "path": n, "size": len(f), "oid": hashlib.sha1(f).hexdigest()}
                for n, f in files.items()
            ]
            self.answer(rows)
        elif match:
            self.answer(
                {"id": model, "modelId": model, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
            )
        elif file and file[3] in files:
            data = files[file[3]]
            self.answer(data, headers={"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha})
        else:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
