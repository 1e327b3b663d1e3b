"""A job as it happens: server-sent events for our SDK and UI, the metrics websocket of the stock SDK (contract 1.5).

Both begin with the history and go on until the job has ended. They read the store at short intervals, so it does not
matter which process writes to it. A cursor `<last step>.<last event>` travels as the id of every server-sent event;
a client that comes back with it misses nothing. After a restart from a checkpoint steps are told again.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket, WebSocketDisconnect

from rewardsmith import wire
from rewardsmith.errors import ConfigError
from rewardsmith.store import StepRecord, Store

POLL_SECONDS = 0.5
PING_SECONDS = 15.0
# What changes with every step is told by the step itself.
_CHANGES_EACH_STEP = {"step": 0, "total_reward": None, "updated_at": None}


@dataclass(frozen=True)
class Cursor:
    step: int = -1
    event: int = 0

    @classmethod
    def parse(cls, text: str | None) -> Cursor:
        """From a Last-Event-ID header. Raises ConfigError."""
        if not text:
            return cls()
        match = re.fullmatch(r"(-1|\d{1,9})\.(\d{1,15})", text)
        if not match:
            raise ConfigError(f"Last-Event-ID {text!r} did not come from this stream; leave it out to start over")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.step}.{self.event}"


async def server_sent(store: Store, uuid: str, cursor: Cursor, closing: threading.Event) -> AsyncIterator[str]:
    """The job whenever it changed, its steps and its timeline from `cursor` on, as the text of a text/event-stream.

    A job that has ended comes last.
    """
    told: wire.Job | None = None
    spoke = time.monotonic()
    while not closing.is_set():
        job, events, steps = await run_in_threadpool(_news, store, uuid, cursor)
        changed = job.model_copy(update=_CHANGES_EACH_STEP)
        if changed != told and job.status not in wire.TERMINAL:
            yield _frame("job", job.model_dump(mode="json", by_alias=True), cursor)
            told, spoke = changed, time.monotonic()
        for event in events:
            cursor = Cursor(_step_after(event, cursor), event.id)
            yield _frame("event", event.model_dump(mode="json", by_alias=True), cursor)
        for record in steps:
            cursor = Cursor(record.step, cursor.event)
            yield _frame("step", {"step": record.step, "epoch": record.epoch, "metrics": record.metrics}, cursor)
        if events or steps:
            spoke = time.monotonic()
            continue  # A long history comes in pages.
        if job.status in wire.TERMINAL:
            yield _frame("job", job.model_dump(mode="json", by_alias=True), cursor)
            return
        if time.monotonic() - spoke > PING_SECONDS:
            yield ": ping\n\n"
            spoke = time.monotonic()
        await asyncio.sleep(POLL_SECONDS)


async def stream_metrics(websocket: WebSocket, store: Store, uuid: str, closing: threading.Event) -> None:
    """One wire.StreamMessage per step and a last one with `is_completed`; the stock SDK drops steps it has seen."""
    await websocket.accept()
    cursor = Cursor()
    try:
        while not closing.is_set():
            job, events, steps = await run_in_threadpool(_news, store, uuid, cursor)
            for event in events:
                cursor = Cursor(_step_after(event, cursor), event.id)
            for record in steps:
                cursor = Cursor(record.step, cursor.event)
                if record.step > 0:
                    await websocket.send_text(_metrics_message(job, record))
            if steps:
                continue
            if job.status in wire.TERMINAL:
                await websocket.send_text(_metrics_message(job, None))
                break
            await _listen(websocket)
        await websocket.close()
    except WebSocketDisconnect:
        return


async def _listen(websocket: WebSocket) -> None:
    """The pause between two looks; raises WebSocketDisconnect at once when the client goes."""
    try:
        async with asyncio.timeout(POLL_SECONDS):
            await websocket.receive_text()
    except TimeoutError:
        return


def _news(store: Store, uuid: str, cursor: Cursor) -> tuple[wire.Job, list[wire.JobEvent], list[StepRecord]]:
    # In this order: a job that is seen to have ended has all its events, and a restart is known before its steps.
    job = store.runs.get(uuid)
    events = store.runs.events(uuid, after=cursor.event)
    step = cursor.step
    for event in events:
        step = _step_after(event, Cursor(step))
    return job, events, store.telemetry.steps(uuid, after_step=step)


def _step_after(event: wire.JobEvent, cursor: Cursor) -> int:
    """A job that restarts from a checkpoint takes back the steps beyond it."""
    return min(cursor.step, event.step or 0) if event.kind == "restarted" else cursor.step


def _frame(event: str, data: Mapping[str, Any], cursor: Cursor) -> str:
    return f"event: {event}\nid: {cursor}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _metrics_message(job: wire.Job, record: StepRecord | None) -> str:
    metrics = record.metrics if record else {}
    message = wire.StreamMessage(
        data=wire.StreamData(
            steps=record.step if record else job.step,
            epoch=int(record.epoch) if record else None,
            learning_rate=metrics.get("learning_rate"),
            train_metrics_loss=metrics.get("loss"),
            grpo_train_rewards=_rewards(job, metrics) or None,
        ),
        meta=wire.StreamMeta(
            is_completed=record is None,
            model_uuid=job.uuid,
            run_id=job.uuid,
            steps=job.step,
            steps_per_epoch=job.steps_per_epoch or 0,
            total_steps=job.total_steps or 0,
        ),
    )
    return message.model_dump_json()


def _rewards(job: wire.Job, metrics: Mapping[str, float]) -> dict[str, float]:
    """Totals and the mean of every function of that step: first those the job has now, in their order."""
    means = {
        name.removeprefix("reward/").removesuffix("/mean"): value
        for name, value in metrics.items()
        if name.startswith("reward/") and name.endswith("/mean")
    }
    now = [name for name in job.params["rewardFns"]["functions"] if name in means]
    totals = {name: metrics[name] for name in ("total_reward", "total_reward_std") if name in metrics}
    return totals | {name: means[name] for name in now} | means
