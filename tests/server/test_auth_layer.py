"""Who may call what: no token, a foreign one, a job's, a user's, on every route there is."""

import re
import socket

import pytest
from fastapi.routing import iter_route_contexts
from server.running import Running
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rewardsmith.server.app import create_app

OPEN = {"/", "/health"}
PRESIGNED = {"/v2/datasets/upload/{token}", "/v2/datasets/download/{token}"}


def every_route(api: Running) -> list[tuple[str, str]]:
    found = []
    for route in iter_route_contexts(create_app(api.config, api.store).routes):
        for method in getattr(route, "methods", None) or {"WEBSOCKET"}:
            found.append((method, route.path))
    return found


def filled(path: str) -> str:
    return re.sub(r"{\w+}", "1", path)


def test_every_route_refuses_callers_without_a_known_token(api: Running):
    routes = every_route(api)
    assert len(routes) > 40
    for method, path in routes:
        if path in OPEN | PRESIGNED or method == "WEBSOCKET":
            continue
        for headers in ({}, {"Authorization": "Bearer pb_wrong"}, {"Authorization": "Basic b3duZXI="}):
            answer = api.anyone.request(method, filled(path), headers=headers)
            assert answer.status_code == 401, (method, path, answer.text)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "token" in answer.text


def test_the_token_is_asked_for_before_the_body_is_read(api: Running):
    assert api.anyone.post("/v2/repos", content=b"{" * 100).status_code == 401
    assert api.anyone.get("/there/is/nothing/here").status_code == 401


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer pb_wrong"}])
def test_websockets_are_refused_before_they_open(api: Running, headers: dict[str, str]):
    address = api.url.replace("http", "ws") + "/v2/finetuning/jobs/1/metrics/stream"
    with pytest.raises(InvalidStatus) as refused, connect(address, additional_headers=headers):
        pass
    assert refused.value.response.status_code == 401


def test_open_pages_need_no_token(api: Running):
    assert api.anyone.get("/health").json()["status"] == "ok"
    assert "Rewardsmith" in api.anyone.get("/").text


def test_a_made_up_presigned_link_opens_nothing(api: Running):
    assert api.anyone.put("/v2/datasets/upload/made-up", content=b"x").status_code == 404
    assert api.anyone.get("/v2/datasets/download/").status_code == 401
    for token in ("made-up", "a.b.c", "rows.99999999999.00", "é.1.é"):
        assert api.anyone.get(f"/v2/datasets/download/{token}").status_code in (403, 404)


@pytest.mark.parametrize(("method", "path"), [("GET", "upload/x"), ("PUT", "download/x"), ("DELETE", "upload/x")])
def test_only_the_method_of_a_presigned_link_is_open(api: Running, method: str, path: str):
    assert api.anyone.request(method, f"/v2/datasets/{path}").status_code == 401


@pytest.mark.parametrize("name", ["upload", "download"])
def test_datasets_may_be_called_like_the_presigned_paths(api: Running, name: str):
    api.upload(name).raise_for_status()
    path = f"/v2/datasets/{name}/download-link"
    assert api.anyone.get(path).status_code == 401
    assert api.anyone.get(api.http.get(path).json()["url"]).text.startswith('{"prompt"')
    assert api.http.delete(f"/v2/datasets/{name}").status_code == 204


@pytest.mark.parametrize("request_line", ["PUT /v2/datasets/upload/made-up", "POST /v2/repos"])
@pytest.mark.parametrize("header", ["Content-Length: 999999999999", "Transfer-Encoding: chunked"])
def test_the_body_of_a_stranger_is_not_read(api: Running, request_line: str, header: str):
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", api.config.port), timeout=10) as connection:
        connection.sendall(f"{request_line} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
        assert connection.recv(4096).startswith((b"HTTP/1.1 404", b"HTTP/1.1 401"))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(100):
                connection.sendall(chunk)


def test_the_token_of_a_job_opens_its_journal_and_nothing_else(api: Running):
    claim, journal = api.claimed_job()
    other, _ = api.claimed_job()
    assert journal.get("spec").status_code == 200
    for method, path in every_route(api):
        if path.startswith("/v2/journal") or path in OPEN | PRESIGNED or method == "WEBSOCKET":
            continue
        assert api.anyone.request(method, filled(path), headers=journal.headers).status_code == 403, path
    foreign = api.anyone.get(f"/v2/journal/{other.uuid}/spec", headers=journal.headers)
    assert foreign.status_code == 403
    unknown = api.anyone.get("/v2/journal/no-such-job/spec", headers=journal.headers)
    assert unknown.status_code == 403
    assert api.anyone.get(f"/v2/finetuning/jobs/{claim.uuid}", headers=journal.headers).status_code == 403


def test_the_token_of_a_user_does_not_open_a_journal(api: Running):
    claim, _ = api.claimed_job()
    assert api.http.get(f"/v2/journal/{claim.uuid}/spec").status_code == 403
    answer = api.http.post(f"/v2/journal/{claim.uuid}/finish", json={"fence": claim.fence, "status": "completed"})
    assert answer.status_code == 403
    assert api.store.runs.get(claim.uuid).status == "training"
