"""Datasets over HTTP: two-step upload, refusals, download links."""

import json
import time

import pytest
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
