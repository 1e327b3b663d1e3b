"""Adapter versions: look up, archive, delete, download as a PEFT zip (contract 1.4, 5.1)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import IO

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from rewardsmith import wire
from rewardsmith.errors import ConfigError
from rewardsmith.server.auth import Caller
from rewardsmith.server.context import ConfigOf, StoreOf

router = APIRouter(tags=["adapters"])
VERSION = "/v2/repos/{repo}/version/{tag}"
CHUNK_BYTES = 256 * 1024


@router.get("/v2/adapters")
def list_adapters(
    caller: Caller, store: StoreOf, repo: str | None = None
) -> dict[str, dict[str, list[wire.AdapterVersion]]]:
    """Every version of a repo, or of all repos, newest first."""
    return {"data": {"adapters": store.registry.list_versions(repo)}}


@router.get(VERSION)
def get_version(repo: str, tag: str, caller: Caller, store: StoreOf) -> wire.AdapterVersion:
    """`tag` is a version such as `3`, or a checkpoint of it such as `3@2`."""
    version = wire.AdapterId.parse(f"{repo}/{tag}")
    return store.registry.get_version(version.repo, version.tag, version.checkpoint)


@router.put(VERSION)
def archive_version(
    repo: str, tag: str, update: wire.VersionUpdate, caller: Caller, store: StoreOf
) -> wire.AdapterVersion:
    version = _whole(repo, tag)
    return store.registry.set_archived(version.repo, version.tag, update.archived)


@router.delete(VERSION, status_code=204)
def delete_version(repo: str, tag: str, caller: Caller, store: StoreOf) -> None:
    """Refused while its job runs."""
    version = _whole(repo, tag)
    store.registry.delete_version(version.repo, version.tag)


@router.get(VERSION + "/download", response_class=StreamingResponse)
def download_version(repo: str, tag: str, caller: Caller, store: StoreOf, config: ConfigOf) -> StreamingResponse:
    """A zip of the PEFT folder."""
    version = wire.AdapterId.parse(f"{repo}/{tag}")
    folder = store.registry.adapter_path(version.repo, version.tag, version.checkpoint)
    file = tempfile.TemporaryFile(dir=config.home)  # noqa: SIM115 - `_chunks` closes it
    store.artifacts.zip_folder(folder, file)
    size = file.tell()
    file.seek(0)
    headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{version.tag}.zip"'}
    return StreamingResponse(_chunks(file), media_type="application/zip", headers=headers)


def _whole(repo: str, tag: str) -> wire.AdapterId:
    version = wire.AdapterId.parse(f"{repo}/{tag}")
    if version.checkpoint is not None:
        raise ConfigError(f"{repo}/{tag} is one checkpoint; this works on whole versions: {repo}/{version.tag}")
    return version


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
