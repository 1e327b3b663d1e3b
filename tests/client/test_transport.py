"""Retries and error messages, against a server that misbehaves."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from client.scripted import Answer, ScriptedServer, scripted_server

from rewardsmith import wire
from rewardsmith.client.address import Address
from rewardsmith.client.transport import Transport, segment
from rewardsmith.errors import ConfigError, RequestError, ResponseError, ServerError, ServerUnreachable

REPO = {"uuid": "r-1", "name": "my-repo", "versions": []}
BUSY = Answer(503, {"error": "the server is starting"})
HTML = b"<html><head><title>Bad gateway</title><style>p {}</style></head><body><h1>502</h1> nginx</body></html>"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


def transport(server: ScriptedServer) -> Transport:
    return Transport(Address(server.url, "t", "the test"), backoff=0.001)


def test_a_busy_server_is_asked_again(server: ScriptedServer):
    server.on("GET /v2/repos/my-repo", BUSY, Answer(hang_up=True), REPO)
    assert transport(server).get("/v2/repos/my-repo", wire.Repo).name == "my-repo"
    assert len(server.requests) == 3


def test_after_four_repetitions_the_error_of_the_server_is_raised(server: ScriptedServer):
    server.on("GET /x", BUSY)
    with pytest.raises(ServerError, match=r"the server is starting \(HTTP 503 from http://127") as raised:
        transport(server).send("GET", "/x")
    assert raised.value.code == 503
    assert len(server.requests) == 5


def test_a_call_that_may_not_run_twice_is_sent_once(server: ScriptedServer):
    server.on("POST /x", BUSY)
    with pytest.raises(ServerError):
        transport(server).send("POST", "/x")
    assert len(server.requests) == 1
    server.on("POST /y", Answer(hang_up=True))
    with pytest.raises(ServerUnreachable, match="broke before the answer came"):
        transport(server).send("POST", "/y")
    assert len(server.sent("POST /y")) == 1


def test_with_an_idempotency_key_it_is_sent_again_under_the_same_key(server: ScriptedServer):
    server.on("POST /x", BUSY, Answer(hang_up=True), {})
    transport(server).send("POST", "/x", key="k-1")
    assert [r.headers["Idempotency-Key"] for r in server.requests] == ["k-1"] * 3


def test_a_refusal_is_not_repeated_and_carries_status_and_reason(server: ScriptedServer):
    server.on("GET /x", Answer(404, {"error": "there is no repo 'x'"}))
    with pytest.raises(RequestError, match=r"there is no repo 'x' \(HTTP 404\)") as raised:
        transport(server).send("GET", "/x")
    assert isinstance(raised.value, RuntimeError), "contract 1.1: every 4xx is a RuntimeError"
    assert len(server.requests) == 1


def test_the_error_object_of_downloads_is_read(server: ScriptedServer):
    server.on("GET /x", Answer(404, {"error": {"message": "no adapter yet"}}))
    with pytest.raises(RequestError, match="no adapter yet"):
        transport(server).send("GET", "/x")


def test_a_refused_token_names_its_origin(server: ScriptedServer):
    server.on("GET /x", Answer(401, {"error": "unknown token"}))
    with pytest.raises(RequestError, match="unknown token; the token used came from the test"):
        transport(server).send("GET", "/x")


def test_the_page_of_a_proxy_becomes_one_readable_line(server: ScriptedServer):
    server.on("GET /x", Answer(502, HTML, "text/html"))
    with pytest.raises(ServerError, match=r"^Bad gateway 502 nginx \(HTTP 502") as raised:
        transport(server).send("GET", "/x")
    assert "<" not in raised.value.message


@pytest.mark.parametrize(
    "answer",
    [
        Answer(404, HTML, "text/html"),
        Answer(302, b"", headers={"Location": "https://elsewhere.example"}),
        Answer(400, ["no object"]),
        Answer(403, {"error": 7}),
    ],
)
def test_another_kind_of_server_is_recognised(server: ScriptedServer, answer: Answer):
    server.on("GET /x", answer)
    with pytest.raises(ResponseError, match="did not answer like a Rewardsmith server") as raised:
        transport(server).send("GET", "/x")
    assert raised.value.code == answer.status


@pytest.mark.parametrize("body", [b"{broken", b"", b"[]", b'{"uuid": 1}', HTML])
def test_an_answer_that_is_not_the_expected_json_is_an_error(server: ScriptedServer, body: bytes):
    server.on("GET /x", Answer(200, body))
    with pytest.raises(ResponseError, match=r"GET .*/x did not answer like"):
        transport(server).get("/x", wire.Repo)


def test_a_server_that_never_answered_is_reported_at_once():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    absent = Transport(Address(url, "t", "the test"), backoff=1000)
    with pytest.raises(ServerUnreachable, match=f"{url}.*rewardsmith serve"):
        absent.send("GET", "/x")


def test_the_token_travels_to_the_server_only(server: ScriptedServer, tmp_path: Path):
    server.on("GET /file", Answer(200, b"content"))
    calls = transport(server)
    calls.download("/file", tmp_path / "own")
    calls.download(f"{server.url}/file", tmp_path / "presigned")
    own, presigned = server.requests
    assert own.headers["Authorization"] == "Bearer t"
    assert "Authorization" not in presigned.headers


def test_a_download_that_breaks_off_is_repeated_and_never_half_there(server: ScriptedServer, tmp_path: Path):
    server.on("GET /file", Answer(200, b"con", declared=7), Answer(200, b"content"))
    transport(server).download("/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"content"
    server.on("GET /other", Answer(200, b"con", declared=7))
    with pytest.raises(ServerUnreachable):
        transport(server).download("/other", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_cannot_address_another_path(name: str):
    with pytest.raises(ConfigError):
        segment(name)
    assert segment("a/b?c") == "a%2Fb%3Fc"
