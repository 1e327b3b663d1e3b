"""What happens in a job, as an iterator of events: server-sent events, read again after every break.

Yields each step once, each line of the job's timeline once, and the job whenever it changed; a job that restarts from
a checkpoint does the steps beyond it again, and they are told again. A server that goes away is waited for
(`Interruption` says so) and asked to go on where it stopped. Draws nothing: `client.view` does, and whoever wants
another picture reads the same events.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import httpx
from pydantic import BaseModel, ValidationError

from rewardsmith import wire
from rewardsmith.client.transport import RETRIED_STATUS, Transport, segment
from rewardsmith.errors import APIError, ResponseError, ServerUnreachable

PATIENCE_SECONDS = 600.0
LONGEST_WAIT_SECONDS = 5.0


class Step(BaseModel, frozen=True):
    """What one step reported; metric names as in design section 7. Step 0 holds held-out scores before training."""

    step: int
    epoch: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Interruption:
    """The server does not answer, or, with `over`, answers again."""

    reason: str
    over: bool = False


Event = Step | wire.Job | wire.JobEvent | Interruption

# What the server sends beside comments; other names are those of a newer server and are skipped.
_KINDS: dict[str, type[Step] | type[wire.Job] | type[wire.JobEvent]] = {
    "step": Step,
    "job": wire.Job,
    "event": wire.JobEvent,
}


@dataclass(frozen=True)
class Message:
    """One server-sent event, or a comment: the server's sign of life."""

    event: str
    data: str
    id: str


def follow(transport: Transport, uuid: str, patience: float = PATIENCE_SECONDS) -> Iterator[Event]:
    """The events of a job from its first step until it has ended.

    Raises ServerUnreachable after `patience` seconds without an answer, RequestError when the job may not be seen.
    """
    path, last_id = f"/v2/finetuning/jobs/{segment(uuid)}/events/stream", ""
    last_step, last_event = -1, 0
    lost_since: float | None = None
    wait = 0.1
    while True:
        try:
            with transport.stream(path, _headers(last_id)) as chunks:
                for message in messages(chunks):
                    if lost_since is not None:
                        yield Interruption("", over=True)
                        lost_since, wait = None, 0.1
                    last_id = message.id or last_id
                    event = _parsed(message)
                    match event:
                        case None:
                            continue
                        case Step(step=step):
                            if step <= last_step:
                                continue
                            last_step = step
                        case wire.JobEvent(id=number):
                            if number <= last_event:
                                continue
                            last_event = number
                            if event.kind == "restarted":
                                last_step = min(last_step, event.step or 0)
                    yield event
                    if isinstance(event, wire.Job) and event.status in wire.TERMINAL:
                        return
            reason: APIError = ServerUnreachable("the server closed the stream before the job ended")
        except httpx.TransportError as error:
            reason = transport.unreachable(error)
        except APIError as error:
            if error.code not in RETRIED_STATUS:
                raise
            reason = error
        if lost_since is None:
            lost_since = time.monotonic()
            yield Interruption(reason.message)
        elif time.monotonic() - lost_since > patience:
            raise reason
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def messages(chunks: Iterable[bytes]) -> Iterator[Message]:
    """Server-sent events out of raw bytes. A message that the end of the bytes cut off is dropped."""
    event, data, last_id = "message", list[str](), ""
    for line in _lines(chunks):
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield Message(event, "\n".join(data), last_id)
            event, data = "message", []
        elif name == "event":
            event = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            last_id = value
        elif not name:
            yield Message("comment", value, last_id)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    # Not `str.splitlines`: it also splits at characters that JSON leaves as they are, such as U+2028.
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode(errors="replace")


def _headers(last_id: str) -> dict[str, str]:
    headers = {"Accept": "text/event-stream"}
    return headers | {"Last-Event-ID": last_id} if last_id else headers


def _parsed(message: Message) -> Step | wire.Job | wire.JobEvent | None:
    kind = _KINDS.get(message.event)
    if kind is None:
        return None
    try:
        return kind.model_validate(json.loads(message.data))
    except (ValueError, ValidationError) as error:
        detail = str(error).splitlines()[0]
        raise ResponseError(f"the event stream sent a {message.event!r} that cannot be read: {detail}") from None
