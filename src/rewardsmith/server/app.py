"""The HTTP API as one FastAPI application over a store. What each request passes: `boundary`, then `auth`, then routes.

Nothing is started here and no file is read; `serve` runs the application.
"""

from __future__ import annotations

import threading
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from rewardsmith.errors import RewardsmithError
from rewardsmith.home import ServerConfig
from rewardsmith.server import boundary
from rewardsmith.server.auth import Authenticate, Caller
from rewardsmith.server.dry_run import Turns
from rewardsmith.server.links import Links
from rewardsmith.server.routes import adapters, datasets, jobs, journal, repos, revisions, sandbox, secrets, users
from rewardsmith.store import Store


def create_app(config: ServerConfig, store: Store) -> FastAPI:
    """`app.state.closing` is a threading.Event that ends the endless streams, to be set before a shutdown."""
    app = FastAPI(
        title="Rewardsmith",
        version=version("rewardsmith"),
        # The document is a route below, behind a token like the rest; the pages around it load foreign scripts.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(boundary.Boundary),
            Middleware(Authenticate, store=store),
            Middleware(
                boundary.BodyLimit, max_body_bytes=config.max_body_bytes, max_dataset_bytes=config.max_dataset_bytes
            ),
        ],
        exception_handlers={
            RewardsmithError: boundary.refuse_rewardsmith_error,
            HTTPException: boundary.refuse_http_error,
            RequestValidationError: boundary.refuse_invalid,
            UnicodeEncodeError: boundary.refuse_unstorable,
            OverflowError: boundary.refuse_unstorable,
        },
    )
    app.state.store = store
    app.state.config = config
    app.state.links = Links()
    app.state.dry_runs = Turns()
    app.state.closing = threading.Event()
    for module in (users, repos, adapters, datasets, jobs, revisions, secrets, journal, sandbox):
        app.include_router(module.router)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_document(caller: Caller) -> dict[str, Any]:
        return app.openapi()

    return app
