"""One HTTP conversation with a server: retries, and answers turned into wire models or errors.

Repeated are only calls that may run twice (GET, PUT, DELETE, and any with an Idempotency-Key), after a broken
connection or a 429, 500, 502, 503 or 504. The token travels to paths of the server alone, never to an absolute URL
such as a presigned one. Addresses and tokens come from `client.address`; the paths from the resources beside this.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Generic, NoReturn, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from rewardsmith.client.address import Address
from rewardsmith.errors import ConfigError, RequestError, ResponseError, ServerError, ServerUnreachable

RETRIES = 4
RETRIED_STATUS = {429, 500, 502, 503, 504}
REPEATABLE = {"GET", "PUT", "DELETE"}
# The server checks reward functions in real processes before it accepts a job, so an answer may take its time.
TIMEOUT = httpx.Timeout(600, connect=10)
# Three missed pings of the event stream mean that nobody is there.
STREAM_TIMEOUT = httpx.Timeout(10, read=45)

Params = Mapping[str, str | int | float | None]
T = TypeVar("T")


class Data(BaseModel, Generic[T]):
    """The envelope in which lists come. `next` goes back as `after` to read on."""

    data: T
    next: str | None = None


class Transport:
    """Calls of one server. `backoff` is the wait in seconds before the first repetition; it doubles each time."""

    def __init__(self, address: Address, backoff: float = 0.5) -> None:
        self.address = address
        self._backoff = backoff
        self._answered = False
        agent = f"rewardsmith-sdk/{version('rewardsmith')} python/{platform.python_version()}"
        # A proxy of the environment is never on the way to this very machine.
        trust_env = not address.is_loopback
        authorization = {"Authorization": f"Bearer {address.token}", "User-Agent": agent}
        self._server = httpx.Client(base_url=address.url, headers=authorization, timeout=TIMEOUT, trust_env=trust_env)
        self._elsewhere = httpx.Client(headers={"User-Agent": agent}, timeout=TIMEOUT, trust_env=trust_env)

    def close(self) -> None:
        self._server.close()
        self._elsewhere.close()

    def get(self, path: str, answer: type[T], params: Params | None = None) -> T:
        """GET `path` as `answer`, which is a wire model or a list or dict of them. Raises APIError."""
        return self.call("GET", path, answer, params=params)

    def call(
        self,
        method: str,
        path: str,
        answer: type[T],
        *,
        body: object = None,
        params: Params | None = None,
        key: str | None = None,
        repeat: bool | None = None,
    ) -> T:
        """The answer of one call, as a wire model. Raises APIError."""
        response = self.send(method, path, body=body, params=params, key=key, repeat=repeat)
        try:
            return TypeAdapter(answer).validate_json(response.content)
        except ValidationError as error:
            raise ResponseError(self._strange(response, error.errors()[0]["msg"]), response.status_code) from None

    def send(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        params: Params | None = None,
        key: str | None = None,
        repeat: bool | None = None,
    ) -> httpx.Response:
        """One call whose answer has status 2xx. `key` is sent as Idempotency-Key; `repeat` overrules the method."""
        request = self._server.build_request(
            method,
            path,
            json=body,
            params={name: value for name, value in (params or {}).items() if value is not None},
            headers={"Idempotency-Key": key} if key else None,
        )
        if repeat is None:
            repeat = method in REPEATABLE or key is not None
        return self._until_answered(repeat, lambda: self._server.send(request))

    def upload(self, url: str, file: Path) -> None:
        """PUT a file to a presigned URL, which is good for one use."""

        def once() -> httpx.Response:
            with file.open("rb") as content:
                return self._client_for(url).put(url, content=content)

        self._until_answered(False, once)

    def download(self, url: str, destination: Path) -> None:
        """GET a path of the server or a presigned URL into a file, which appears when it is whole."""
        part = destination.with_name(destination.name + ".part")

        def once() -> httpx.Response:
            with self._client_for(url).stream("GET", url) as response:
                if response.is_success:
                    with part.open("wb") as file:
                        for chunk in response.iter_bytes():
                            file.write(chunk)
                else:
                    response.read()
                return response

        try:
            self._until_answered(True, once)
            os.replace(part, destination)
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[Iterator[bytes]]:
        """The open body of one GET, in chunks. Raises APIError, and httpx.TransportError when it breaks."""
        with self._server.stream("GET", path, headers=dict(headers), timeout=STREAM_TIMEOUT) as response:
            self._answered = True
            if not response.is_success:
                response.read()
                self._raise_for(response)
            yield response.iter_bytes()

    def _client_for(self, url: str) -> httpx.Client:
        return self._server if url.startswith("/") else self._elsewhere

    def _until_answered(self, may_repeat: bool, once: Callable[[], httpx.Response]) -> httpx.Response:
        for attempt in count():
            last = attempt == RETRIES or not may_repeat
            try:
                response = once()
            except httpx.TransportError as error:
                # A server that has not answered yet was probably never started: say so at once.
                absent = isinstance(error, httpx.ConnectError) and not self._answered
                if last or absent:
                    raise self.unreachable(error) from None
            else:
                self._answered = True
                if response.is_success:
                    return response
                if last or response.status_code not in RETRIED_STATUS:
                    self._raise_for(response)
            time.sleep(self._backoff * 2**attempt)
        raise AssertionError("not reached")

    def unreachable(self, error: httpx.TransportError) -> ServerUnreachable:
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServerUnreachable(
                f"no server answers at {self.address.url} ({reason}). Start one with `rewardsmith serve`, "
                "or set REWARDSMITH_BASE_URL to the address of yours"
            )
        return ServerUnreachable(
            f"the connection to {self.address.url} broke before the answer came ({reason}). If `rewardsmith serve` "
            "is still running there, look whether the request was carried out before you repeat it"
        )

    def _raise_for(self, response: httpx.Response) -> NoReturn:
        status, text = response.status_code, _error_text(response)
        if text is None and not 500 <= status < 600:
            raise ResponseError(self._strange(response, "not the JSON of this API"), status)
        if status >= 500:
            raise ServerError(f"{text or _summary(response)} (HTTP {status} from {self.address.url})", status)
        if status == 401:
            text = f"{text}; the token used came from {self.address.token_origin}"
        raise RequestError(f"{text} (HTTP {status})", status)

    def _strange(self, response: httpx.Response, reason: str) -> str:
        return (
            f"{response.request.method} {response.request.url} did not answer like a Rewardsmith server "
            f"(HTTP {response.status_code}, {reason}): {_summary(response)}. Is {self.address.url} the right address?"
        )


def segment(name: str) -> str:
    """A name as one segment of a path. Raises ConfigError for one that would address something else."""
    if name in ("", ".", ".."):
        raise ConfigError(f"{name!r} is no name")
    return quote(name, safe="")


def _error_text(response: httpx.Response) -> str | None:
    """The `error` of a JSON answer: a text, or an object with a `message` (downloads, contract 1.1)."""
    try:
        error = json.loads(response.content)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) and text else None


def _summary(response: httpx.Response) -> str:
    """The beginning of a body as one line of plain text, without markup."""
    text = re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", response.text, flags=re.DOTALL | re.IGNORECASE)
    words = " ".join(text.split())
    return (words[:120] + "…" if len(words) > 120 else words) or "an empty body"
