"""Datasets over HTTP: two-step upload, refusals, download links."""

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from processes import wait_until
from server.running import ROWS, Running

from rewardsmith.server.links import LIFETIME_SECONDS


def test_an_uploaded_file_becomes_a_dataset_in_the_stock_shape(api: Running):
    ticket = api.http.post("/v2/datasets/upload", json={"fileName": "rows.jsonl", "mimeType": "text/plain"}).json()
    assert ticket["requiredHeaders"] == {}
    assert ticket["presignedUrl"].startswith(api.url)
    put = api.anyone.put(ticket["presignedUrl"], content=ROWS, headers={"Content-Type": "text/plain"})
    assert put.status_code == 200
    dataset = api.http.put("/v2/datasets/upload", json={"name": "two", "uploadToken": ticket["uploadToken"]}).json()
    assert dataset["status"] == "connected" and dataset["lastError"] is None
    assert dataset["connection"] == {"type": "file", "name": "file_uploads"}
    assert (dataset["rows"], dataset["columns"]) == (2, ["prompt", "answer"])
    found = api.http.get("/v1/datasets/name/two?connectionName=file_uploads")
    assert found.json() == dataset
    assert api.http.get("/v1/datasets/name/two?connectionName=elsewhere").status_code == 404
    assert "two" in [d["name"] for d in api.http.get("/v2/datasets").json()["data"]["datasets"]]


def test_an_upload_url_takes_one_body(api: Running):
    ticket = api.http.post("/v2/datasets/upload", json={"fileName": "rows.jsonl"}).json()
    assert api.anyone.put(ticket["presignedUrl"], content=ROWS).status_code == 200
    assert api.anyone.put(ticket["presignedUrl"], content=b"other").status_code == 409
    finish = {"name": "once", "uploadToken": ticket["uploadToken"]}
    assert api.http.put("/v2/datasets/upload", json=finish).json()["rows"] == 2
    assert api.http.put("/v2/datasets/upload", json=finish).status_code in (404, 409)


def test_an_upload_that_is_still_going_on_cannot_be_finished(api: Running):
    ticket = api.http.post("/v2/datasets/upload", json={"fileName": "rows.jsonl"}).json()
    finish = {"name": "half", "uploadToken": ticket["uploadToken"]}
    early: list[httpx.Response] = []

    def body() -> Iterator[bytes]:
        yield ROWS
        # All that was sent so far has reached the disk.
        wait_until(lambda: any(api.store.artifacts.scratch().glob("upload-*.part")), "the upload begins", 10)
        early.append(api.http.put("/v2/datasets/upload", json=finish))
        yield ROWS

    assert api.anyone.put(ticket["presignedUrl"], content=body()).status_code == 200
    assert early[0].status_code == 409 and "has not been received whole" in early[0].json()["error"]
    assert api.http.put("/v2/datasets/upload", json=finish).json()["rows"] == 4


def test_an_upload_that_breaks_off_leaves_nothing(api: Running):
    ticket = api.http.post("/v2/datasets/upload", json={"fileName": "rows.jsonl"}).json()
    path = ticket["presignedUrl"].removeprefix(api.url)
    parts = lambda: list(api.store.artifacts.scratch().glob("upload-*"))  # noqa: E731
    with socket.create_connection(("127.0.0.1", api.config.port)) as connection:
        connection.sendall(f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode() + ROWS)
        wait_until(parts, "the upload begins", 10)
    wait_until(lambda: not parts(), "it is forgotten", 10)
    finish = {"name": "broken", "uploadToken": ticket["uploadToken"]}
    assert api.http.put("/v2/datasets/upload", json=finish).status_code == 404


def test_a_bad_file_is_refused_with_its_rows_and_leaves_no_dataset(api: Running):
    answer = api.upload("bad", b'{"question": "2 + 2"}\n{"question": "3"}\n')
    assert answer.status_code == 400
    assert "prompt" in answer.json()["error"] and "question" in answer.json()["error"]
    assert api.http.get("/v1/datasets/name/bad").status_code == 404


def test_a_taken_name_and_an_unknown_format_are_refused(api: Running):
    assert api.upload("rows").status_code == 409
    assert api.http.post("/v2/datasets/upload", json={"fileName": "rows.exe"}).status_code == 400


def test_a_dataset_is_downloaded_by_a_link_that_needs_no_token(api: Running):
    link = api.http.get("/v2/datasets/rows/download-link").json()
    assert link["fileExtension"] == "jsonl"
    rows = [json.loads(line) for line in api.anyone.get(link["url"]).text.splitlines()]
    assert rows == [{"prompt": "2 + 2 =", "answer": 4}, {"prompt": "3 + 5 =", "answer": 8}]
    forged = link["url"][:-1] + ("0" if link["url"][-1] != "0" else "1")
    assert api.anyone.get(forged).status_code == 403


def test_a_download_link_expires(api: Running, monkeypatch: pytest.MonkeyPatch):
    link = api.http.get("/v2/datasets/rows/download-link").json()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + LIFETIME_SECONDS + 1)
    assert api.anyone.get(link["url"]).status_code == 403


def test_a_dataset_in_use_stays(api: Running):
    api.upload("doomed").raise_for_status()
    assert api.http.delete("/v2/datasets/doomed").status_code == 204
    assert api.http.get("/v1/datasets/name/doomed").status_code == 404
    uuid = api.queued_job()
    assert api.http.delete("/v2/datasets/rows").status_code == 409
    api.http.post(f"/v2/finetuning/jobs/{uuid}/cancel")
