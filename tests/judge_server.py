"""A judge, as its clients see it: OpenAI's chat completions over HTTP, with the replies that a test gives it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Judge(ThreadingHTTPServer):
    """Answers with `replies` in turn, the last one again and again. As a context manager it serves while it is entered.

    A reply is a text, or (status, headers, body); status 0 hangs up. `requests` are (path, headers, body).
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[Any] = ["Score: 7"]
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        if isinstance(reply, str):
            reply = 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
        status, headers, text = reply
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers), {}))
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Nothing: the test looks at `requests`."""
