"""Stored secrets of the caller (contract 1.7, 5.1). The key travels in the body, also of GET."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body

from rewardsmith import wire
from rewardsmith.server.auth import Caller
from rewardsmith.server.context import StoreOf

router = APIRouter(prefix="/v2/secrets", tags=["secrets"])
Key = Annotated[wire.SecretKey, Body()]


@router.get("")
def get_secret(request: Key, caller: Caller, store: StoreOf) -> wire.SecretValue:
    return wire.SecretValue(key=request.key, value=store.secrets.get(caller.user_id, request.key))


@router.get("/keys")
def list_keys(caller: Caller, store: StoreOf) -> list[wire.Secret]:
    """Which there are, without the values."""
    return store.secrets.list(caller.user_id)


@router.post("")
def create_secret(request: wire.SecretRequest, caller: Caller, store: StoreOf) -> wire.Secret:
    return store.secrets.create(caller.user_id, request.key, request.value)


@router.put("")
def update_secret(request: wire.SecretRequest, caller: Caller, store: StoreOf) -> wire.Secret:
    return store.secrets.update(caller.user_id, request.key, request.value)


@router.delete("", status_code=204)
def delete_secret(request: Key, caller: Caller, store: StoreOf) -> None:
    """Refused while a job that runs or waits refers to it."""
    store.secrets.delete(caller.user_id, request.key)
