"""The one door to user code: `RewardPool.score` sends completions to worker processes and brings back scores.

User code never runs in this process. Calls go out in chunks and their results come back one by one, so a worker that
dies or hangs names the call that did it: that call is tried once more, alone and in a fresh worker, and then gets its
outcome; the other calls of the chunk are sent again. Deadlines are kept from here, by killing. `process` holds one
worker, `worker` runs inside it, `outcomes` says what comes back; which scores stop a job is not decided here.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Any, Self, cast

from rewardsmith.errors import RewardPoolError
from rewardsmith.rewards import source
from rewardsmith.rewards.outcomes import Outcome, Score
from rewardsmith.rewards.process import Limits, Result, WorkerProcess
from rewardsmith.wire import RevisionFunction

MAX_WORKERS = 8
MAX_CHUNK = 64
MAX_CHUNK_CHARACTERS = 2**20
TRIES = 2  # workers that one call may kill, and starts that may fail before the pool gives up
LEFT_BEHIND = "\n[this call left a thread or a process running; its worker was replaced]"


@dataclass(frozen=True)
class Group:
    """The completions of one prompt. `example` is the dataset's row, JSON types only."""

    prompt: str
    example: dict[str, Any]
    completions: Sequence[str]


@dataclass(slots=True)
class _Call:
    """One function on one completion. `alone`: its chunk broke the protocol, so it may not share one again."""

    group: int
    completion: int
    function: int
    alone: bool = False
    killed: int = 0


@dataclass(eq=False)
class _Worker:
    """A process and the calls it has: `waiting` in order, `done` held back until the chunk is known to be clean."""

    process: WorkerProcess
    to_load: int
    fresh: bool = True
    waiting: deque[_Call] = field(default_factory=deque)
    done: list[tuple[_Call, Result]] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return not self.to_load and not self.waiting


def available_workers() -> int:
    """The cores this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


class RewardPool:
    """Worker processes that hold one revision's functions. Use it as a context manager, or `start` and `close` it.

    `score` may be called from any thread, one call at a time. The kernel kills a worker when the thread that started
    it ends, so all workers are started by one thread that lives as long as the pool.
    """

    def __init__(
        self, functions: Sequence[RevisionFunction], workers: int | None = None, limits: Limits | None = None
    ) -> None:
        self.functions = list(functions)
        self.workers = workers or available_workers()
        self.limits = limits or Limits()
        self._workers: set[_Worker] = set()
        self._failed_starts: list[str] = []
        self._turns = threading.Lock()
        self._groups: Sequence[Group] = ()
        self._examples: list[str] = []
        self._queue: deque[_Call] = deque()
        self._suspects: deque[_Call] = deque()  # each ended a worker and gets its second try in a fresh one
        self._scores: dict[tuple[int, int, int], Score] = {}
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="reward-spawner")
        self._scratch = tempfile.mkdtemp(prefix="rewardsmith-rewards-")
        self._release = weakref.finalize(self, _release, self._workers, self._spawner, self._scratch)

    def start(self) -> None:
        """Check the functions and load them in every worker.

        Raises RewardPoolError naming function, line and reason; the pool is closed then.
        """
        try:
            for function in self.functions:
                problems = source.check(function.source)
                if problems:
                    reasons = "\n".join(str(problem) for problem in problems)
                    raise RewardPoolError(f"reward function {function.name!r}: {reasons}")
            for _ in range(self.workers):
                self._spawn()
            while any(worker.to_load for worker in self._workers) and not self._failed_starts:
                self._turn()
            if self._failed_starts:
                raise RewardPoolError(self._failed_starts[0])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Wait for a `score` that runs, kill the workers and all they started, remove their files."""
        with self._turns:
            self._release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, Score]]]:
        """For each group, for each completion, the score by function name.

        Raises RewardPoolError when the pool is closed, or when a function with on_error="fail" fails.
        """
        functions = range(len(self.functions))
        with self._turns:
            self._groups, self._examples = groups, [json.dumps(group.example) for group in groups]
            self._queue = deque(
                _Call(g, c, f)
                for g, group in enumerate(groups)
                for c in range(len(group.completions))
                for f in functions
            )
            self._suspects.clear()
            self._scores, self._failed_starts, wanted = {}, [], len(self._queue)
            try:
                for worker in list(self._workers):
                    self._look_after(worker)
                while len(self._scores) < wanted:
                    self._hand_out()
                    self._turn()
            finally:
                for worker in [worker for worker in self._workers if worker.waiting or worker.done]:
                    self._remove(worker)  # left in the middle by an exception
            return [
                [
                    {self.functions[f].name: self._scores[g, c, f] for f in functions}
                    for c in range(len(group.completions))
                ]
                for g, group in enumerate(groups)
            ]

    # ---- workers ----------------------------------------------------------------------------------------------------

    def _spawn(self) -> None:
        if not self._release.alive:
            raise RewardPoolError("the reward pool is closed")
        try:
            process = self._spawner.submit(WorkerProcess, self._scratch, self.limits).result()
        except OSError as error:
            self._failed_starts.append(f"a reward worker cannot be started: {error}")
            return
        self._workers.add(_Worker(process, to_load=1 + len(self.functions)))
        process.load([(function.name, function.source) for function in self.functions])

    def _remove(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        worker.process.stop()

    def _turn(self) -> None:
        """Wait for something to happen and deal with it. Deaths that close no descriptor are looked for every 0.1 s."""
        now = time.monotonic()
        deadlines = [self._deadline(worker) for worker in self._workers if not worker.idle]
        with selectors.PollSelector() as selector:
            for worker in self._workers:
                worker.process.register(selector)
            selector.select(max(0.0, min([now + 0.1, *deadlines]) - now))
        for worker in list(self._workers):
            self._look_after(worker)

    def _deadline(self, worker: _Worker) -> float:
        return worker.process.clock + (self.limits.load_seconds if worker.to_load else self.limits.call_seconds)

    def _look_after(self, worker: _Worker) -> None:
        process = worker.process
        process.flush()
        process.drain()
        ended = process.has_ended()  # asked first, so that all it ever sent is there to be received
        results = process.receive()
        if process.broken == "violated":
            self._violated(worker)
            return
        for result in results:
            self._take(worker, result)
            if worker not in self._workers:
                return
        if worker.idle:
            if ended or process.broken:
                self._remove(worker)
        elif ended or process.broken:
            self._lost(worker, "crash", process.last_words())
        elif process.log_bytes > self.limits.output_bytes:
            self._lost(worker, "output_limit", f"printed more than {self.limits.output_bytes} bytes")
        elif time.monotonic() > self._deadline(worker):
            seconds = self.limits.load_seconds if worker.to_load else self.limits.call_seconds
            self._lost(worker, "timeout", f"no result after {seconds:g} s\n{process.stack()}".strip())

    # ---- calls ------------------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give idle workers something to do, replace missing ones, give up when none can be started."""
        for worker in self._workers:
            chunk = self._next_chunk(worker.fresh) if worker.idle else None
            if chunk:
                worker.waiting, worker.fresh = chunk, False
                worker.process.call(self._order(chunk), len(chunk))
        for _ in range(min(self.workers - len(self._workers), len(self._queue) + len(self._suspects))):
            if len(self._failed_starts) < TRIES:
                self._spawn()
        while not self._workers and (self._queue or self._suspects):
            call = (self._suspects or self._queue).popleft()
            error = f"no worker could be started: {self._failed_starts[-1]}"
            self._settle(call, Result("infrastructure", 0.0, 0.0, error=error))

    def _next_chunk(self, fresh: bool) -> deque[_Call] | None:
        """Large chunks while there is much to do, single calls towards the end, so that all workers finish together."""
        if self._suspects and (fresh or len(self._failed_starts) >= TRIES):
            return deque([self._suspects.popleft()])
        if not self._queue:
            return None
        chunk = deque([self._queue.popleft()])
        size = min(MAX_CHUNK, len(self._queue) // (4 * self.workers))
        characters = len(self._text(chunk[0]))
        while len(chunk) < size and not chunk[0].alone and not self._queue[0].alone:
            characters += len(self._text(self._queue[0]))
            if characters > MAX_CHUNK_CHARACTERS:
                break
            chunk.append(self._queue.popleft())
        return chunk

    def _text(self, call: _Call) -> str:
        return self._groups[call.group].completions[call.completion]

    def _order(self, chunk: deque[_Call]) -> list[Any]:
        return [
            [
                self._groups[g].prompt,
                self._examples[g],
                [
                    [self._groups[g].completions[c], [call.function for call in of_completion]]
                    for c, of_completion in groupby(of_group, key=lambda call: call.completion)
                ],
            ]
            for g, of_group in groupby(chunk, key=lambda call: call.group)
        ]

    def _take(self, worker: _Worker, result: Result) -> None:
        if worker.to_load:
            if result.outcome == "ok":
                worker.to_load -= 1
            else:
                self._lost(worker, result.outcome, result.error)
        elif result.outcome == "out_of_memory":
            # Earlier calls may have filled the worker; a fresh one tells.
            self._lost(worker, "out_of_memory", result.error, result.prints)
        else:
            worker.done.append((worker.waiting.popleft(), result))
            if result.left_behind or not worker.waiting:
                self._settle_done(worker)
            if result.left_behind:
                self._queue.extendleft(reversed(worker.waiting))
                self._remove(worker)

    def _lost(self, worker: _Worker, outcome: str, error: str, prints: str = "") -> None:
        """The first waiting call ended the worker, or its function could not be loaded."""
        seconds = time.monotonic() - worker.process.clock
        self._remove(worker)
        if worker.to_load:
            index = len(self.functions) - worker.to_load
            subject = "a reward worker" if index < 0 else f"reward function {self.functions[index].name!r}"
            self._failed_starts.append(f"{subject} cannot be loaded: {error}")
            return
        self._settle_done(worker)
        call = worker.waiting.popleft()
        self._queue.extendleft(reversed(worker.waiting))
        call.killed += 1
        if call.killed < TRIES:
            self._suspects.append(call)
        else:
            self._settle(call, Result(outcome, 0.0, seconds, prints, error))

    def _violated(self, worker: _Worker) -> None:
        """Something wrote to the result channel that was not a result: nothing of this chunk can be believed."""
        if worker.to_load or len(worker.done) + len(worker.waiting) == 1:
            worker.waiting.extendleft(call for call, _ in worker.done)
            worker.done.clear()
            self._lost(worker, "crash", "the process broke the protocol: something else wrote to its result channel")
            return
        self._remove(worker)
        calls = [*(call for call, _ in worker.done), *worker.waiting]
        for call in calls:
            call.alone = True
        self._queue.extendleft(reversed(calls))

    def _settle_done(self, worker: _Worker) -> None:
        while worker.done:
            self._settle(*worker.done.pop())

    def _settle(self, call: _Call, result: Result) -> None:
        function = self.functions[call.function]
        outcome = cast(Outcome, result.outcome)
        if result.outcome == "none":
            outcome = "abstain" if function.none == "abstain" else "not_a_number"
        value: float | None = None
        if outcome == "ok":
            value = result.value
        elif outcome not in ("abstain", "infrastructure"):
            if function.on_error == "fail":
                raise RewardPoolError(
                    f"reward function {function.name!r} failed and its on_error is 'fail': {outcome}, {result.error}"
                )
            value = 0.0 if function.on_error == "zero" else None
        error = result.error if outcome not in ("ok", "abstain") else None
        prints = result.prints + LEFT_BEHIND if result.left_behind else result.prints
        self._scores[call.group, call.completion, call.function] = Score(outcome, value, result.seconds, prints, error)


def _release(workers: set[_Worker], spawner: ThreadPoolExecutor, scratch: str) -> None:
    while workers:
        workers.pop().process.stop()
    spawner.shutdown(wait=False)
    shutil.rmtree(scratch, ignore_errors=True)
