"""A small HTTP server that speaks the journal routes and misbehaves on order. It stores what it was told, in order.

`faults` is consumed one per request: a number is answered as that status, "drop" takes the report in and closes the
connection without an answer, "refuse" closes it before reading. `control` is the answer to everything else.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from rewardsmith.wire import Control, JobSpec, Revision

TOKEN = "job-token"


class ScriptedServer:
    def __init__(self, spec: JobSpec | None = None, revisions: dict[int, Revision] | None = None) -> None:
        self.spec = spec
        self.revisions = revisions or {}
        self.control = Control()
        self.faults: deque[int | str] = deque()
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.on_report: Callable[[str, dict[str, Any]], None] = lambda path, body: None
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self._handle(None)

            def do_POST(self) -> None:
                self._handle(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _handle(self, body: dict[str, Any] | None) -> None:
                path = self.path.partition("/v2/journal/")[2].partition("/")[2]
                status, answer = outer._answer(path, body, self.headers["Authorization"])
                if status is None:
                    self.close_connection = True
                    return
                content = answer.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for at, body in self.received if at == path]

    def _answer(self, path: str, body: dict[str, Any] | None, authorization: str) -> tuple[int | None, str]:
        if authorization != f"Bearer {TOKEN}":
            return 401, '{"error": "no token"}'
        with self._lock:
            # Heartbeats come when they like and would take the faults meant for reports.
            fault = self.faults.popleft() if self.faults and path != "heartbeat" else None
            if fault == "refuse":
                return None, ""
            if isinstance(fault, int):
                return fault, '{"error": "on order"}'
            if body is not None:
                self.received.append((path, body))
                self.on_report(path, body)
            if fault == "drop":
                return None, ""
            if path == "spec":
                assert self.spec is not None
                return 200, self.spec.model_dump_json(by_alias=True)
            if path.startswith("revisions/"):
                return 200, self.revisions[int(path.partition("/")[2])].model_dump_json(by_alias=True)
            return 200, self.control.model_dump_json(by_alias=True)
