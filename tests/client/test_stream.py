"""The event stream: parsing, breaks, repetitions."""

from collections.abc import Iterator

import pytest
from client.scripted import Answer, ScriptedServer, job, scripted_server, sse, step

from rewardsmith import wire
from rewardsmith.client.address import Address
from rewardsmith.client.stream import Event, Interruption, Message, Step, follow, messages
from rewardsmith.client.transport import Transport
from rewardsmith.errors import RequestError, ResponseError, ServerError, ServerUnreachable

ROUTE = "GET /v2/finetuning/jobs/j-1/events/stream"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


def events(server: ScriptedServer, patience: float = 60) -> Iterator[Event]:
    return follow(Transport(Address(server.url, "t", "the test")), "j-1", patience)


def stream(*parts: tuple[str, object, str], **options: object) -> Answer:
    return Answer(200, sse(*parts), "text/event-stream", **options)


def event(number: int, kind: str = "info", message: str = "hello", step: int | None = None) -> dict[str, object]:
    return {"id": number, "at": "2026-01-01T00:00:00Z", "kind": kind, "message": message, "step": step}


def test_messages_are_found_whatever_the_chunks():
    raw = b"id: 3.1\r\nevent: step\r\ndata: {\ndata: }\n\n: ping\n\ndata:none\n\nevent: empty\n\ndata: cut off"
    expected = [
        Message("step", "{\n}", "3.1"),
        Message("comment", " ping".strip(), "3.1"),
        Message("message", "none", "3.1"),
    ]
    for size in (1, 2, 7, len(raw)):
        chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
        assert list(messages(chunks)) == expected


def test_a_line_separator_inside_json_does_not_end_the_line():
    [message] = messages(['data: "a\u2028b\x85c"\n\n'.encode()])
    assert message.data == '"a\u2028b\x85c"'


def test_events_come_typed_and_end_with_the_job(server: ScriptedServer):
    server.on(
        ROUTE,
        stream(
            ("job", job("training"), "0.0"),
            ("step", step(1, a=0.5), "1.0"),
            ("event", event(4), "1.4"),
            ("of a newer server", {}, "1.4"),
            ("job", job("completed"), "1.4"),
        ),
    )
    kinds = [type(e) for e in events(server)]
    assert kinds == [wire.Job, Step, wire.JobEvent, wire.Job]


def test_after_a_break_it_goes_on_where_it_stopped_and_repeats_nothing(server: ScriptedServer):
    server.on(
        ROUTE,
        stream(("step", step(1), "1.0"), ("event", event(1), "1.1"), ("step", step(2), "2.1"), declared=10_000),
        Answer(503, {"error": "starting"}),
        Answer(hang_up=True),
        stream(
            ("step", step(2), "2.1"),
            ("event", event(1), "2.1"),
            ("step", step(3), "3.1"),
            ("job", job("completed"), "3.1"),
        ),
    )
    seen = list(events(server))
    assert [e.step for e in seen if isinstance(e, Step)] == [1, 2, 3]
    assert len([e for e in seen if isinstance(e, wire.JobEvent)]) == 1
    assert [e.over for e in seen if isinstance(e, Interruption)] == [False, True]
    assert [r.headers.get("Last-Event-ID") for r in server.requests] == [None, "2.1", "2.1", "2.1"]


def test_a_stream_that_ends_early_is_a_break_too(server: ScriptedServer):
    server.on(ROUTE, stream(("step", step(1), "1.0")), stream(("job", job("errored"), "1.0")))
    seen = list(events(server))
    assert isinstance(seen[1], Interruption)
    assert seen[-1].status == "errored"


def test_steps_that_a_restart_repeats_are_told_again(server: ScriptedServer):
    restarted = ("event", event(7, "restarted", "attempt 2 goes on after step 1", step=1), "1.7")
    server.on(
        ROUTE,
        stream(
            ("step", step(1), "1.0"), ("step", step(2), "2.0"), restarted, ("step", step(2), "2.7"), declared=10_000
        ),
        stream(restarted, ("step", step(2), "2.7"), ("step", step(3), "3.7"), ("job", job("completed"), "3.7")),
    )
    assert [e.step for e in events(server) if isinstance(e, Step)] == [1, 2, 2, 3]


def test_patience_ends(server: ScriptedServer):
    server.on(ROUTE, Answer(503, {"error": "starting"}))
    with pytest.raises(ServerError, match="starting"):
        list(events(server, patience=0.05))
    server.script.clear()
    server.on(ROUTE, Answer(hang_up=True))
    with pytest.raises(ServerUnreachable):
        list(events(server, patience=0.05))


def test_a_refusal_is_raised_at_once(server: ScriptedServer):
    server.on(ROUTE, Answer(404, {"error": "there is no job 'j-1'"}))
    with pytest.raises(RequestError, match="there is no job"):
        list(events(server))
    assert len(server.requests) == 1


@pytest.mark.parametrize("data", [b"{garbage", b'{"step": "x"}', b"[]"])
def test_garbage_is_named(server: ScriptedServer, data: bytes):
    server.on(ROUTE, Answer(200, b"event: step\ndata: " + data + b"\n\n", "text/event-stream"))
    with pytest.raises(ResponseError, match="event stream sent a 'step' that cannot be read"):
        list(events(server))
