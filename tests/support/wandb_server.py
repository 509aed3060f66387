"""A loopback server that gives W&B's client the required answers, and keeps its data."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class WandbServer(http.server.ThreadingHTTPServer):
    """Received data: `runs` are the upserted runs, `streams` the chunks of their files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.runs: list[dict[str, Any]] = []
        self.streams: list[dict[str, Any]] = []
        self.asked: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def config(self) -> dict[str, Any]:
        """The last config of the run, as shown on the run's page."""
        texts = [run["config"] for run in self.runs if run.get("config")]
        return {key: entry["value"] for key, entry in json.loads(texts[-1]).items()}

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of one of the run's streamed files."""
        chunks = (s["files"][name] for s in self.streams if name in (s.get("files") or {}))
        return [json.loads(line) for chunk in chunks for line in chunk["content"]]

    def summary(self) -> dict[str, Any]:
        """The run's last summary."""
        return self.rows("wandb-summary.json")[-1]

    def exit_code(self) -> int | None:
        """The run's exit code; None while it runs."""
        return next((s["exitcode"] for s in self.streams if s.get("complete")), None)


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server on a free port, for one test."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Answers(http.server.BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Type", "").partition(";")[0] != "application/json":
            self._send({})  # the client's telemetry of itself
            return
        body = json.loads(data)
        if self.path.endswith("/file_stream"):
            self.server.streams.append(body)
            self._send({})
        else:
            self.server.asked.append(str(body.get("operationName") or body.get("query", ""))[:80])
            self._send({"data": self._answer(body.get("query", ""), body.get("variables") or {})})

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        self._send({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._send({})

    def _answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            self.server.runs.append(variables)
            project = {"id": "p", "name": variables.get("project") or "launcher", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables.get("name"), "displayName": variables.get("displayName"),
                      "description": None, "config": variables.get("config"), "sweepName": None, "project": project,
                      "summaryMetrics": None, "historyLineCount": 0}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/upload/{n}"}
                     for n, name in enumerate(variables.get("files") or [])]  # fmt: skip
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _send(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        del arguments
