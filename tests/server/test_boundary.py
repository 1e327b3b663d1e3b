"""Bad requests, bodies that are too large, and errors that nobody foresaw."""

import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.running import ROWS, Running, running


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "the body is not JSON"),
        (b'{"name": "a"} and more', 400, "the body is not JSON"),
        (b"\xff\xfe", 400, ""),
        (b"[" * 100_000, 400, ""),
        (b"", 422, "body"),
        (b"[]", 422, "body"),
        (b"null", 422, "body"),
        (b"{}", 422, "body.name: Field required"),
        (b'{"name": 3}', 422, "body.name"),
        (b'{"name": "a", "nmae": "b"}', 422, "body.nmae: Extra inputs are not permitted"),
        (b'{"name": "a", "description": "half \\ud800"}', 400, "not valid Unicode"),
        (b'{"name": "with a\\u0000nul"}', 400, ""),
        (b'{"name": "../../etc"}', 400, ""),
        (b'{"name": "' + b"x" * 5000 + b'"}', 400, ""),
    ],
)
def test_malformed_bodies_are_refused_in_one_sentence(api: Running, body: bytes, status: int, says: str):
    answer = api.http.post("/v2/repos", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_what_was_sent_is_not_repeated_in_a_refusal(api: Running):
    answer = api.http.post("/v2/repos", json={"name": ["the secret"]})
    assert answer.status_code == 422
    assert "the secret" not in answer.text


def test_unknown_paths_and_methods_say_so_in_json(api: Running):
    assert api.http.get("/v2/nothing").json() == {"error": "there is no GET /v2/nothing in this API"}
    assert api.http.get("/v2/nothing").status_code == 404
    answer = api.http.patch("/v2/repos")
    assert answer.status_code == 405 and "PATCH" in answer.json()["error"]


def test_every_answer_carries_the_security_headers(api: Running):
    for answer in (api.anyone.get("/"), api.anyone.get("/v2/repos"), api.http.get("/v2/repos"), api.http.get("/no")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 1000):
        yield b"x" * 1000


def test_a_body_over_the_limit_is_refused_declared_or_chunked(api: Running):
    limit = api.config.max_body_bytes
    for body in (b"x" * (limit + 1), chunks(limit + 1000)):
        answer = api.http.post("/v2/repos", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413, answer.text
        assert f"{limit:,} bytes" in answer.json()["error"]
    just_fits = json.dumps({"name": "fits"}).encode().ljust(limit)
    headers = {"Content-Type": "application/json"}
    assert api.http.post("/v2/repos", content=just_fits, headers=headers).status_code == 200


def test_an_upload_has_a_limit_of_its_own_and_leaves_nothing_behind(api: Running):
    limit = api.config.max_dataset_bytes
    ticket = api.http.post("/v2/datasets/upload", json={"fileName": "big.jsonl"}).json()
    answer = api.anyone.put(ticket["presignedUrl"], content=chunks(limit + 1000))
    assert answer.status_code == 413 and f"{limit:,} bytes" in answer.json()["error"]
    finished = api.http.put("/v2/datasets/upload", json={"name": "big", "uploadToken": ticket["uploadToken"]})
    assert finished.status_code in (404, 409)
    assert api.http.get("/v1/datasets/name/big").status_code == 404
    leftovers = [path for path in api.config.home.rglob("*") if path.is_file() and path.stat().st_size > limit]
    assert leftovers == []
    between = ROWS * (api.config.max_body_bytes // len(ROWS) + 100)
    assert api.config.max_body_bytes < len(between) < limit
    assert api.upload("between", between).status_code == 200


def test_an_unforeseen_error_shows_a_reference_and_nothing_of_the_inside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with running(tmp_path / "home") as server:
        with sqlite3.connect(server.config.home / "rewardsmith.sqlite") as database:
            database.execute("PRAGMA foreign_keys=off")
            database.execute("DROP TABLE repos")
        with caplog.at_level(logging.ERROR, logger="rewardsmith.server"):
            answer = server.http.get("/v2/repos")
    assert answer.status_code == 500
    text = answer.json()["error"]
    reference = text.removeprefix("internal error, see the server log, reference ")
    assert len(reference) == 8
    assert "repos" not in text and "Traceback" not in text
    assert reference in caplog.text and "Traceback" in caplog.text and "no such table" in caplog.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_token_of_a_presigned_link_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with running(tmp_path / "home") as server:
        server.prepare()
        link = server.http.get("/v2/datasets/rows/download-link").json()["url"]
        upload = server.http.post("/v2/datasets/upload", json={"fileName": "rows.jsonl"}).json()["presignedUrl"]
        with sqlite3.connect(server.config.home / "rewardsmith.sqlite") as database:
            database.execute("PRAGMA foreign_keys=off")
            database.execute("DROP TABLE datasets")
            database.execute("DROP TABLE uploads")
        with caplog.at_level(logging.ERROR, logger="rewardsmith.server"):
            answers = [server.anyone.get(link), server.anyone.put(upload, content=b"x")]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert "/v2/datasets/download/... failed" in caplog.text and "/v2/datasets/upload/... failed" in caplog.text
    for url in (link, upload):
        assert url.rpartition("/")[2] not in caplog.text


def test_the_openapi_document_is_generated_and_needs_a_token(api: Running):
    document = api.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert "/v2/finetuning/jobs/{uuid}/config" in document["paths"]
    assert "encodedFn" not in json.dumps(document["paths"])
    assert {"bearerFormat", "scheme"} & set(next(iter(document["components"]["securitySchemes"].values())))
