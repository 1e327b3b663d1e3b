"""A real HTTP server that answers from a script, so that tests can make it misbehave."""

import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

USER = {"id": 1, "username": "owner", "uuid": "u-1"}


@dataclass
class Answer:
    """`body` is sent as JSON unless it is bytes; `declared` is a false Content-Length, to break off in the middle."""

    status: int = 200
    body: Any = None
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    declared: int | None = None
    hang_up: bool = False

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class ScriptedServer:
    """Answers to `METHOD /path` in the order they were added; the last one is given again and again."""

    url: str
    requests: list[Request] = field(default_factory=list)
    script: dict[str, deque[Answer]] = field(default_factory=lambda: defaultdict(deque))

    def on(self, route: str, *answers: Answer | Any) -> None:
        self.script[route].extend(a if isinstance(a, Answer) else Answer(body=a) for a in answers)

    def sent(self, route: str) -> list[Request]:
        return [r for r in self.requests if f"{r.method} {r.path.partition('?')[0]}" == route]


def _handler(server: ScriptedServer) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.requests.append(Request(self.command, self.path, dict(self.headers), body))
            script = server.script.get(f"{self.command} {self.path.partition('?')[0]}")
            if not script:
                answer = Answer(404, {"error": f"the script has no {self.command} {self.path}"})
            else:
                answer = script.popleft() if len(script) > 1 else script[0]
            if answer.hang_up:
                self.close_connection = True
                return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.content) if answer.declared is None else answer.declared))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    script = ScriptedServer("")
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(script))
    script.url = f"http://127.0.0.1:{http.server_port}"
    script.on("GET /users/current", USER)
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield script
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def sse(*messages: tuple[str, Any, str]) -> bytes:
    """Server-sent events out of (event, data, id)."""
    return b"".join(f"id: {i}\nevent: {e}\ndata: {json.dumps(d)}\n\n".encode() for e, d, i in messages)


def job(status: str = "training", **fields: Any) -> dict[str, Any]:
    """A job as the server shows it."""
    return {
        "uuid": "j-1",
        "baseModel": "countdown-tiny",
        "datasetName": "rows",
        "targetRepoName": "my-repo",
        "targetVersionTag": 1,
        "status": status,
        "params": {"base_model": "countdown-tiny", "train_steps": 3, "rewardFns": {"functions": {}}},
        "totalSteps": 3,
        **fields,
    }


def step(number: int, **means: float) -> dict[str, Any]:
    metrics = {"total_reward": sum(means.values()), "total_reward_std": 0.5}
    metrics |= {f"reward/{name}/mean": value for name, value in means.items()}
    return {"step": number, "epoch": number / 10, "metrics": metrics}
