"""The caller's account, and the two pages that need no token."""

from __future__ import annotations

from html import escape
from importlib.metadata import version

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from rewardsmith import wire
from rewardsmith.server.auth import Caller
from rewardsmith.server.context import StoreOf

router = APIRouter(tags=["users"])


@router.get("/users/current")
def current_user(caller: Caller, store: StoreOf) -> wire.CurrentUser:
    """Who the token belongs to (contract 1.1)."""
    return store.registry.user(caller.user_id)


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok", "version": version("rewardsmith")}


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def front_page() -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Rewardsmith</title>'
        f"<h1>Rewardsmith {escape(version('rewardsmith'))}</h1>"
        "<p>This server is running. Use it with the Python SDK or the <code>rewardsmith</code> command.</p>"
    )
