"""`mae runs --serve`: the table of runs and each run's page, made anew at each request, for this machine alone."""

import json
import os
import sys
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from mae.errors import UserError
from mae.report.html import page
from mae.report.run import page_data
from mae.tools.run_rows import age_of, differing_keys, find_runs, state_of
from mae.tools.runs import Selection, as_json

HOST = "127.0.0.1"


class RunsHandler(BaseHTTPRequestHandler):
    """`/` is the table, `/runs.json` its rows, `/run?name=RUN` a run's page, `/run.json?name=RUN` that page's data."""

    def __init__(self, selection: Selection, *arguments: object):
        self.selection, self.folder = selection, selection.folder
        super().__init__(*arguments)  # type: ignore[arg-type]  # the server's own arguments

    def do_GET(self) -> None:
        """Answers a request; a page of a site elsewhere cannot ask, since the host must be this machine's name."""
        if (self.headers.get("Host") or "").partition(":")[0] not in (HOST, "localhost"):
            return self.send_error(HTTPStatus.FORBIDDEN, f"ask for {HOST}")
        url = urlsplit(self.path)
        name = parse_qs(url.query).get("name", [""])[0]
        try:
            if url.path == "/":
                return self.answer(page("Runs", {"table": self.table()}, live=True), "text/html")
            if url.path == "/runs.json":
                return self.answer(json.dumps(self.table()), "application/json")
            if url.path in ("/run", "/run.json") and (run := self.run_named(name)) is not None:
                data = {"runs": [live_data(run)]}
                if url.path == "/run.json":
                    return self.answer(json.dumps(data), "application/json")
                return self.answer(page(name, data, live=True), "text/html")
        except UserError as error:  # a run that is just being written
            return self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        self.send_error(HTTPStatus.NOT_FOUND)

    def table(self) -> dict[str, object]:
        """The selected rows, the keys in which they differ, and the results that have a column."""
        rows, best = self.selection.rows(), self.selection.best
        keys = differing_keys(rows) if len(rows) > 1 else []
        return {
            "rows": as_json(rows),
            "keys": keys,
            "results": [best] if best else [],
            "selection": self.selection.text,
        }

    def run_named(self, name: str) -> Path | None:
        """The run of that name in the table: no other path is read."""
        return next((run for run in find_runs(self.folder) if os.path.relpath(run, self.folder) == name), None)

    def answer(self, text: str, kind: str) -> None:
        """Sends a text."""
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of each request."""


def live_data(run: Path) -> dict[str, object]:
    """What the page of a run shows; an unfinished run is `running` or `stale`, as in the table."""
    data = page_data(run)
    return data | {"state": state_of(run, str(data["state"]), age_of(run))}


def serve(selection: Selection, port: int) -> int:
    """Serves the page until Ctrl-C; returns the exit code. Raises OSError where the port is taken."""
    try:
        server = ThreadingHTTPServer((HOST, port), partial(RunsHandler, selection))
    except (OSError, OverflowError) as error:
        raise UserError(f"Port {port} cannot be listened on ({error}): choose another, as --serve 8266.") from error
    with server:
        sys.stdout.write(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends it)\n")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
