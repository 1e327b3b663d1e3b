"""What every request passes on its way in and out: errors become JSON, bodies are limited, headers are hardened.

Plain ASGI layers: outermost `Boundary`, then `auth.Authenticate`, then `BodyLimit`. Refusals are
`{"error": "<text>"}`, those of downloads `{"error": {"message": "<text>"}}` (contract 1.1). An error that nobody
foresaw is logged with its traceback and a reference; the caller gets only the reference.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from rewardsmith.errors import RewardsmithError

log = logging.getLogger("rewardsmith.server")

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
UPLOADS = "/v2/datasets/upload/"
DOWNLOADS = "/v2/datasets/download/"


def refusal(scope: Scope, status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The JSON answer for an error of any kind."""
    error: object = {"message": text} if scope["path"].endswith("/download") else text
    return JSONResponse({"error": error}, status, headers=headers)


async def refuse_rewardsmith_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RewardsmithError)
    if error.status >= 500:
        return _internal(request.scope, error)
    return refusal(request.scope, error.status, error.message)


async def refuse_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    text = error.detail
    if error.status_code == 404:
        text = f"there is no {request.method} {request.url.path} in this API"
    elif error.status_code == 405:
        text = f"{request.url.path} does not take {request.method}"
    return refusal(request.scope, error.status_code, text, error.headers)


async def refuse_invalid(request: Request, error: Exception) -> JSONResponse:
    """One sentence for a request that does not fit the API; what was sent is not repeated, it may be secret."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        reason = found[0]["ctx"]["error"]
        return refusal(request.scope, 400, f"the body is not JSON: {reason} at character {found[0]['loc'][-1]}")
    sentences = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in found[:5]]
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return refusal(request.scope, 422, "; ".join(sentences) + more)


async def refuse_unstorable(request: Request, error: Exception) -> JSONResponse:
    """JSON can spell half a character and numbers of any size, which no database takes."""
    what = "a text in the request is not valid Unicode" if isinstance(error, UnicodeError) else "a number is too large"
    return refusal(request.scope, 400, f"{what}: {error}")


def _internal(scope: Scope, error: BaseException) -> JSONResponse:
    reference = secrets.token_hex(4)
    log.error("reference %s: %s failed", reference, _loggable(scope["path"]), exc_info=error)
    return refusal(scope, 500, f"internal error, see the server log, reference {reference}")


def _loggable(path: str) -> str:
    """Without the token of a presigned link."""
    for prefix in (UPLOADS, DOWNLOADS):
        if path.startswith(prefix):
            return f"{prefix}..."
    return path


class Boundary:
    """Adds the security headers and turns an unforeseen error into an answer that shows nothing of the inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await self._websocket(scope, receive, send)
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = False

        async def send_hardened(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_hardened)
        except Exception as error:
            if started:
                raise  # Only cutting the connection tells the client that the answer is not whole.
            await _internal(scope, error)(scope, receive, send_hardened)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except WebSocketDisconnect:
            pass
        except Exception:
            log.exception("websocket %s failed", scope["path"])
            await WebSocket(scope, receive, send).close(1011)


class BodyLimit:
    """Refuses bodies over `max_body_bytes` (dataset uploads: `max_dataset_bytes`), declared or chunked.

    uvicorn drops what still comes after an answer, so that a client that reads only after sending sees the refusal.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_dataset_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_dataset_bytes = max_dataset_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = self._max_dataset_bytes if scope["path"].startswith(UPLOADS) else self._max_body_bytes
        too_large = f"the body is larger than the {limit:,} bytes that this server takes here"
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or int(declared) > limit:
            return await refusal(scope, 413, too_large)(scope, receive, send)
        size = 0

        async def receive_counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, too_large)
            return message

        await self._app(scope, receive_counted, send)
