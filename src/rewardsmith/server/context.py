"""What routes work with: the store, the config, the key for presigned links, turns of dry runs; as dependencies."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends
from starlette.requests import HTTPConnection

from rewardsmith.home import ServerConfig
from rewardsmith.server.dry_run import Turns
from rewardsmith.server.links import Links
from rewardsmith.store import Store


# Asynchronous, because FastAPI would run a plain function in a thread of its own for every request.
async def _store(connection: HTTPConnection) -> Store:
    return cast(Store, connection.app.state.store)


async def _config(connection: HTTPConnection) -> ServerConfig:
    return cast(ServerConfig, connection.app.state.config)


async def _links(connection: HTTPConnection) -> Links:
    return cast(Links, connection.app.state.links)


async def _dry_runs(connection: HTTPConnection) -> Turns:
    return cast(Turns, connection.app.state.dry_runs)


StoreOf = Annotated[Store, Depends(_store)]
ConfigOf = Annotated[ServerConfig, Depends(_config)]
LinksOf = Annotated[Links, Depends(_links)]
DryRunsOf = Annotated[Turns, Depends(_dry_runs)]
