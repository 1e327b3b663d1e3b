"""Dataset files: upload in two steps through a presigned URL, look up, list, download, delete (contract 1.3, 5.1)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from rewardsmith import wire
from rewardsmith.server.auth import Caller
from rewardsmith.server.boundary import DOWNLOADS, UPLOADS
from rewardsmith.server.context import LinksOf, StoreOf

router = APIRouter(tags=["datasets"])


@router.post("/v2/datasets/upload")
def begin_upload(body: wire.UploadRequest, request: Request, caller: Caller, store: StoreOf) -> wire.UploadTicket:
    """The URL in the answer takes the bytes of one file, once, within an hour."""
    token = store.datasets.begin_upload(body.file_name, caller.user_id)
    return wire.UploadTicket(presigned_url=_url(request, UPLOADS + token), upload_token=token)


@router.put(UPLOADS + "{token}", status_code=200)
async def receive_upload(token: str, request: Request, store: StoreOf) -> None:
    """The body goes to disk as it comes; the token in the path is the credential."""
    file = await run_in_threadpool(store.datasets.receive_upload, token)
    try:
        async for chunk in request.stream():
            await run_in_threadpool(file.write, chunk)
        await run_in_threadpool(store.datasets.complete_upload, token, file)
    except BaseException:  # Also a cancelled request: half a file is of no use.
        await run_in_threadpool(store.datasets.abandon_upload, token, file)
        raise


@router.put("/v2/datasets/upload")
def finish_upload(body: wire.UploadComplete, caller: Caller, store: StoreOf) -> wire.Dataset:
    """Check the file and register it; a refusal names the rows and the reasons."""
    return store.datasets.finish_upload(body.name, body.upload_token, caller.user_id)


@router.get("/v2/datasets")
def list_datasets(caller: Caller, store: StoreOf) -> dict[str, dict[str, list[wire.Dataset]]]:
    """The newest first."""
    return {"data": {"datasets": store.datasets.list()}}


@router.get("/v1/datasets/name/{name}")
def get_dataset(
    name: str,
    caller: Caller,
    store: StoreOf,
    connection: Annotated[str, Query(alias="connectionName")] = wire.DEFAULT_CONNECTION,
) -> wire.Dataset:
    return store.datasets.get(f"{connection}/{name}")


@router.get("/v2/datasets/{ref}/download-link")
def link_to_dataset(ref: str, request: Request, caller: Caller, store: StoreOf, links: LinksOf) -> wire.DownloadLink:
    """A URL that needs no token, for an hour."""
    dataset = store.datasets.get(ref)
    return wire.DownloadLink(url=_url(request, DOWNLOADS + links.sign(dataset.uuid)), file_extension="jsonl")


@router.get(DOWNLOADS + "{token}", response_class=FileResponse)
def download_dataset(token: str, store: StoreOf, links: LinksOf) -> FileResponse:
    dataset = store.datasets.get(links.subject(token))
    file = store.artifacts.fetch(store.datasets.path(dataset.uuid))
    return FileResponse(file, media_type="application/jsonl", filename=f"{dataset.name}.jsonl")


@router.delete("/v2/datasets/{ref}", status_code=204)
def delete_dataset(ref: str, caller: Caller, store: StoreOf) -> None:
    """Refused while a job that has not ended uses it."""
    store.datasets.delete(ref)


def _url(request: Request, path: str) -> str:
    return str(request.base_url).rstrip("/") + path
