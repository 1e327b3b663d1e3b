"""The job's line to the server: reports out, Control in, by HTTP with the job's token. No second channel exists.

Reports go out in order, one at a time. While the server is away they wait in a bounded backlog and the job works on;
with the backlog full it waits, and after `patience` seconds without an answer it gives up. A heartbeat every few
seconds keeps the lease and brings Control between reports. Answers that end the job at once (lease lost, canceled)
surface in `check`, which the loop and the engine call often.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx

from rewardsmith.errors import JobCanceled, JobError, LeaseLost, ServerLost, ServerUnreachable
from rewardsmith.rewards.redact import redactor
from rewardsmith.wire import (
    CheckpointReport,
    Control,
    EventReport,
    Finish,
    Heartbeat,
    JobSpec,
    Revision,
    StepReport,
)

log = logging.getLogger("rewardsmith.journal")

BACKLOG = 64
PATIENCE_SECONDS = 600.0
HEARTBEAT_SECONDS = 5.0
ANSWER_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 5.0  # between two tries to reach the server

# The token or the fence holds no longer, or the job is gone: whoever owns the job now, it is not this process.
NOT_OURS = {401, 403, 404, 409}
# Not the report's fault; the same one may pass later.
TRY_AGAIN = {408, 425, 429}

Report = StepReport | CheckpointReport | EventReport
Message = Report | Finish | Heartbeat

_PATHS: dict[type[Message], str] = {
    StepReport: "report",
    CheckpointReport: "checkpoint",
    EventReport: "event",
    Finish: "finish",
    Heartbeat: "heartbeat",
}
Answer = TypeVar("Answer", JobSpec, Revision, Control)


class Journal:
    """Use it as a context manager: inside, the heartbeat runs. `fence` is the number of this attempt."""

    def __init__(
        self,
        url: str,
        uuid: str,
        fence: int,
        token: str,
        *,
        backlog: int = BACKLOG,
        patience: float = PATIENCE_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self.fence = fence
        self.waited_seconds = 0.0
        self._root = f"{url.rstrip('/')}/v2/journal/{uuid}"
        # No proxies from the environment: those are for the base model's download, not for our own server.
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"}, timeout=ANSWER_SECONDS, trust_env=False
        )
        self._backlog = backlog
        self._patience = patience
        self._heartbeat_seconds = heartbeat_seconds
        self._pending: deque[Message] = deque()
        self._control = Control()
        self._redact = redactor({})
        self._answered = time.monotonic()
        self._ended: JobError | None = None
        self._turn = threading.Lock()  # one request at a time, so that answers come in the order of the questions
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()
        self._heart.join(ANSWER_SECONDS)
        self._client.close()

    @property
    def control(self) -> Control:
        """The newest answer. Raises as `check` does."""
        self.check()
        return self._control

    @property
    def caught_up(self) -> bool:
        """Whether the server has answered every report."""
        return not self._pending

    def check(self) -> None:
        """Raises JobCanceled, LeaseLost, ServerLost, or JobError for a report that the server refused."""
        if self._ended:
            raise self._ended
        if self._control.action == "cancel":
            raise JobCanceled("canceled by the user")
        self._give_up_in_time()

    def spec(self) -> JobSpec:
        """From now on no event and no error has the value of a secret of the job in it."""
        spec = self._fetch("spec", JobSpec)
        self._redact = redactor(spec.secrets)
        with self._turn:
            if self._control == Control():  # nothing was answered yet
                self._control = Control(revision=spec.revision.revision)
        return spec

    def revision(self, number: int) -> Revision:
        return self._fetch(f"revisions/{number}", Revision)

    def send(self, report: Report, *, wait: bool = False) -> Control:
        """Sends a report, after those that wait; with `wait` it comes back only when all have arrived."""
        self._pending.append(report)
        self._drain(0 if wait else self._backlog)
        return self.control

    def event(
        self,
        kind: Literal["paused", "resumed", "revision", "warning", "info"],
        message: str,
        *,
        step: int | None = None,
        revision: int | None = None,
        refused: str | None = None,
        wait: bool = False,
    ) -> Control:
        report = EventReport(
            fence=self.fence,
            kind=kind,
            message=self._redact(message),
            step=step,
            revision=revision,
            refused=refused and self._redact(refused),
        )
        return self.send(report, wait=wait)

    def flush(self, seconds: float) -> bool:
        """Tries for some seconds to get all reports through; whether it worked."""
        deadline = time.monotonic() + seconds
        while self._pending and time.monotonic() < deadline:
            self._drain(len(self._pending))
            self._rest(0.2 if self._pending else 0)
        return self.caught_up

    def finish(self, finish: Finish) -> None:
        """The last report; comes back when it and all before have arrived. Only a lost lease stops it.

        A report that the server refuses on the way is an error of the run, unless the run has one of its own. An end
        that is refused is told again without its checkpoint. Raises JobError when that is refused too.
        """
        if not isinstance(self._ended, LeaseLost):
            self._ended = None
        finish = finish.model_copy(update={"error": finish.error and self._redact(finish.error)})
        self._pending.append(finish)
        while self._pending:
            try:
                self._drain(0)
            except (LeaseLost, ServerLost):
                raise
            except JobError as refusal:
                log.error("%s", refusal)
                finish = _with_error(finish, refusal)
                if self._pending:
                    self._pending[-1] = finish
                elif finish.checkpoint is None:
                    raise
                else:
                    finish = finish.model_copy(update={"checkpoint": None})
                    self._pending.append(finish)

    def beat(self) -> None:
        """One heartbeat now. Without an answer nothing happens; `check` counts the time."""
        try:
            self._control_of(Heartbeat(fence=self.fence))
        except ServerUnreachable as error:
            log.warning("no answer to a heartbeat: %s", error)

    def wait(self, seconds: float) -> None:
        """Lets time pass at a step boundary, then asks the server what to do."""
        self._rest(seconds)
        self.beat()

    def _beat_on(self) -> None:
        while not self._closed.wait(self._heartbeat_seconds) and not self._ended:
            try:
                self.beat()
            except JobError as error:
                self._ended = error  # raised by `check`, in the job's own thread

    def _rest(self, seconds: float) -> None:
        self.waited_seconds += seconds
        self._closed.wait(seconds)

    def _drain(self, leave: int) -> None:
        """Sends until nothing waits; while the server is away, until at most `leave` reports wait."""
        pause = 0.1
        while self._pending:
            try:
                self._control_of(self._pending[0])
                self._pending.popleft()
            except ServerUnreachable as error:
                if len(self._pending) <= leave:
                    log.warning("%d report(s) wait: %s", len(self._pending), error)
                    return
                self._give_up_in_time()
                self._rest(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            except JobError:
                self._pending.popleft()  # refused: it must not stand in the way of the reports after it
                raise

    def _give_up_in_time(self) -> None:
        silent = time.monotonic() - self._answered
        if silent > self._patience:
            raise ServerLost(f"the server at {self._root} has not answered for {silent:.0f} s; the job gives up")

    def _fetch(self, path: str, model: type[Answer]) -> Answer:
        pause = 0.1
        while True:
            try:
                with self._turn:
                    return self._request("GET", path, model)
            except ServerUnreachable:
                self._give_up_in_time()
                self._rest(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _control_of(self, report: Message) -> None:
        body = report.model_dump_json(by_alias=True)
        with self._turn:
            if self._ended:
                raise self._ended
            self._control = self._request("POST", _PATHS[type(report)], Control, body)

    def _request(self, method: str, path: str, model: type[Answer], body: str | None = None) -> Answer:
        """Raises ServerUnreachable when trying again may help, LeaseLost and JobError when it does not."""
        try:
            headers = {"Content-Type": "application/json"} if body else None
            answer = self._client.request(method, f"{self._root}/{path}", content=body, headers=headers)
        except httpx.TransportError as error:
            raise ServerUnreachable(f"{method} {path}: {error or type(error).__name__}") from None
        if answer.status_code in NOT_OURS:
            self._ended = LeaseLost(f"another attempt owns this job: {path} was answered {_said(answer)}")
            raise self._ended
        if answer.status_code >= 500 or answer.status_code in TRY_AGAIN:
            raise ServerUnreachable(f"{method} {path} was answered {_said(answer)}")
        if answer.status_code >= 400:
            raise JobError(f"the server refused the job's {path}: {_said(answer)}")
        try:
            result = model.model_validate_json(answer.content)
        except ValueError:
            raise ServerUnreachable(f"{method} {path}: not the journal's JSON, {_said(answer)}") from None
        self._answered = time.monotonic()
        return result


def _with_error(finish: Finish, refusal: JobError) -> Finish:
    if finish.status in ("errored", "canceled"):
        return finish
    return finish.model_copy(update={"status": "errored", "error": refusal.message})


def _said(answer: httpx.Response) -> str:
    return f"{answer.status_code} {answer.text[:500]}".strip()
