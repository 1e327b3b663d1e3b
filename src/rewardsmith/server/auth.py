"""Who may call what. One layer decides for every path, before any body is read.

`/` and `/health` are open. A presigned path carries its own credential, that of an upload is checked here, that of a
download by its route. `/v2/journal/<job>/...` takes the token of
that very job and no other; everything else takes a user's token and never a job's. Stale fences are refused by the
store. Tokens come as `Authorization: Bearer ...`; the store knows only their SHA-256.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from rewardsmith.errors import Conflict, Forbidden, NotFound, RewardsmithError, Unauthorized
from rewardsmith.server.boundary import DOWNLOADS, UPLOADS, refusal
from rewardsmith.store import Identity, Store

OPEN = {"/", "/health"}
UPLOAD = re.compile(UPLOADS + "([^/]+)")
DOWNLOAD = re.compile(DOWNLOADS + "(?!download-link$)[^/]+")  # that one is the link to a dataset named `download`
JOURNAL = "/v2/journal/"
IDENTITY = "rewardsmith.identity"
# The body of a stranger is not read. Of one that is longer than this not even the rest is dropped: that takes as long
# as the stranger likes.
DROPPED_BYTES = 64 * 2**10


class Authenticate:
    """Puts the caller's identity into the scope, or refuses with 401 or 403."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope.get("path", ""), scope.get("method")
        if scope["type"] == "lifespan" or path in OPEN or (method == "GET" and DOWNLOAD.fullmatch(path)):
            return await self._app(scope, receive, send)
        try:
            if method == "PUT" and (upload := UPLOAD.fullmatch(path)):
                await run_in_threadpool(self._store.datasets.check_upload, upload[1])
            else:
                scope[IDENTITY] = await run_in_threadpool(self._store.registry.identify, _bearer(scope))
                _allow(scope[IDENTITY], path)
        except (Unauthorized, Forbidden, NotFound, Conflict) as error:
            return await _refuse(scope, receive, send, error)
        await self._app(scope, receive, send)


def _bearer(scope: Scope) -> str:
    scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized(
            "no API token: send it as `Authorization: Bearer <token>`. The owner's is in the file that "
            "`rewardsmith serve` names when it starts"
        )
    return token.strip()


def _allow(identity: Identity, path: str) -> None:
    if path.startswith(JOURNAL):
        job = path.removeprefix(JOURNAL).partition("/")[0]
        if identity.scope != "job" or identity.job_uuid != job:
            raise Forbidden("the journal of a job takes the token of that job alone")
    elif identity.scope != "user":
        raise Forbidden("the token of a job opens its journal and nothing else")


async def _refuse(scope: Scope, receive: Receive, send: Send, error: RewardsmithError) -> None:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    sent = Headers(scope=scope)
    if "transfer-encoding" in sent or int(sent.get("content-length", "0")) > DROPPED_BYTES:
        headers["Connection"] = "close"
    answer: Response = refusal(scope, error.status, error.message, headers)
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(answer)
    else:
        await answer(scope, receive, send)


_documented = HTTPBearer(auto_error=False, description="An API token")


async def _caller(connection: HTTPConnection, _: Annotated[object, Security(_documented)]) -> Identity:
    """`Authenticate` has decided already; HTTPBearer is here for the OpenAPI document. Raises Unauthorized."""
    identity = connection.scope.get(IDENTITY)
    if not isinstance(identity, Identity):
        raise Unauthorized("this address takes an API token")
    return identity


Caller = Annotated[Identity, Depends(_caller)]
