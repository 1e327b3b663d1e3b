"""Repos and the versions in them (contract 1.2, 5.1)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from rewardsmith import wire
from rewardsmith.server.auth import Caller
from rewardsmith.server.context import StoreOf

router = APIRouter(prefix="/v2/repos", tags=["repos"])


@router.post("")
def create_repo(request: wire.RepoRequest, caller: Caller, store: StoreOf) -> wire.Repo:
    return store.registry.create_repo(request.name, request.description, request.exists_ok, caller.user_id)


@router.get("")
def list_repos(
    caller: Caller, store: StoreOf, limit: Annotated[int, Query(ge=1, le=1000)] = 10
) -> dict[str, dict[str, list[wire.Repo]]]:
    """The newest first."""
    return {"data": {"repos": store.registry.list_repos(limit)}}


@router.get("/{ref}")
def get_repo(ref: str, caller: Caller, store: StoreOf) -> wire.Repo:
    """By name or uuid."""
    return store.registry.get_repo(ref)


@router.delete("/{ref}", status_code=204)
def delete_repo(ref: str, caller: Caller, store: StoreOf) -> None:
    """With its versions. Refused while one of its jobs runs."""
    store.registry.delete_repo(ref)
