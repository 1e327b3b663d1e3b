"""One round of scoring: calls are handed out to a fleet of executors until every one of them has its outcome.

An executor that ends or hangs names the call that did it. Where several may have done it (all in one event loop, or all
in one sandbox), they run again one by one. Nothing is known here of who asks, nor of processes and pipes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

from rewardsmith.errors import RewardPoolError
from rewardsmith.rewards import modes
from rewardsmith.rewards.calls import MAX_CHUNK, TRIES, Call, Calls, Chunk, Group, Prompt, Result
from rewardsmith.rewards.executor import Executor
from rewardsmith.rewards.fleet import Fleet
from rewardsmith.rewards.inside import frames
from rewardsmith.rewards.modes import Canary, Way
from rewardsmith.rewards.outcomes import Outcome, Score
from rewardsmith.rewards.sandbox.zygote import Sandbox

STACK_SECONDS = 0.2  # for a late call to say where it stands; most do at once
CLOSING_SECONDS = 0.5  # for the end of a process that has closed its channel
LATE_SECONDS = 1.0  # beyond the deadline of calls that are timed inside
QUICK_SECONDS = 0.001  # calls up to this are sent on before the last ones have come back
LEFT_BEHIND = "\n[this call left a thread or a process running; its executor was replaced]"
BROKEN = "the process broke the protocol: something else wrote to its result channel"


class Round:
    """`scores` is by group, completion and function, complete when `run` has come to its end."""

    def __init__(
        self,
        groups: Sequence[Group],
        ways: Sequence[Way],
        fleet: Fleet,
        canary: Canary,
        concurrency: int,
        note: Callable[[str], None],
    ) -> None:
        self.scores: dict[tuple[int, int, int], Score] = {}
        self._ways, self._fleet, self._canary, self._note = ways, fleet, canary, note
        self._concurrency = concurrency
        self._in_chunks = any(way.mode == "chunk" for way in ways)
        calls = list(self._calls(groups))
        self._queue = Calls(calls, fleet.size)
        self._asked = self._ask_canary(calls)

    def _calls(self, groups: Sequence[Group]) -> Iterator[Call]:
        for g, group in enumerate(groups):
            prompt, texts = Prompt(group), list(group.completions)
            for f, way in enumerate(self._ways):
                if way.function.per == "group" and texts:
                    yield Call(prompt, texts, f, [(g, c, f) for c in range(len(texts))], way.together)
            for c, text in enumerate(texts):
                for f, way in enumerate(self._ways):
                    if way.function.per == "completion":
                        yield Call(prompt, text, f, [(g, c, f)], way.together)

    def _ask_canary(self, calls: Sequence[Call]) -> list[Call]:
        """A first call of each function that a fresh executor answers too, and nobody else's results."""
        firsts = {call.function: call for call in reversed(calls) if self._ways[call.function].watched}
        probes = self._canary.propose(list(firsts.values()))
        if probes:
            self._queue.special.append(probes)
        return [firsts[probe.function] for probe in probes]

    def run(self, interrupted: Callable[[], bool]) -> None:
        """Raises RewardPoolError when it is interrupted, when a function with on_error="fail" fails, and when the
        fleet can no longer be kept up.
        """
        try:
            self._listen(0.0)  # to what has happened since the last round
            while self._queue or any(not executor.idle for executor in self._fleet.executors):
                self._hand_out()
                self._listen(float("inf"))
                if interrupted():
                    raise RewardPoolError("scoring was interrupted")
            for call in self._asked:
                scores = [self.scores[place] for place in call.places]
                values = tuple(score.value for score in scores if score.outcome == "ok" and score.value is not None)
                self._canary.scored(call.function, values if len(values) == len(scores) else None)
        except BaseException:
            for executor in [executor for executor in self._fleet.executors if not executor.idle]:
                self._fleet.remove(executor)
            for call in self._asked:
                self._canary.scored(call.function, None)
            raise

    # ---- handing out ------------------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give executors something to do, replace missing ones, give up when none can be started."""
        now = time.monotonic()
        for executor in list(self._fleet.executors):
            if not modes.is_worn(executor, now):
                if executor.idle or self._may_have_more(executor):
                    self._give_next(executor)
            elif executor.idle:
                self._fleet.remove(executor)
        self._fleet.supply(len(self._fleet.executors) + len(self._queue))
        if len(self._fleet.failures) >= TRIES and not self._fleet.executors:
            error = f"no executor could be started: {self._fleet.failures[-1]}"
            for call in self._queue.drain():
                self._settle_all(call, Result("infrastructure", 0.0, 0.0, error=error))

    def _may_have_more(self, executor: Executor) -> bool:
        quick = self._fleet.pace < QUICK_SECONDS and not self._in_chunks
        return quick and len(executor.chunks) == 1 and executor.chunks[0].may_be_followed

    def _give_next(self, executor: Executor) -> None:
        others = [other for other in self._fleet.executors if other is not executor and not other.idle]
        if any(other.chunks[0].calls[0].exclusive for other in others):
            return
        largest = modes.CHUNK if self._in_chunks else MAX_CHUNK
        calls = self._queue.next(fresh=executor.fresh, others=bool(others), largest=largest, pace=self._fleet.pace)
        if calls:
            executor.give(self._chunk(calls))
        elif executor.idle and not executor.fresh and self._queue.special:
            self._fleet.remove(executor)  # what is left needs one that has done nothing yet

    def _chunk(self, calls: list[Call]) -> Chunk:
        if not calls[0].places:
            return Chunk(calls, probes=len(calls))
        if calls[0].together:
            return Chunk(calls, concurrency=self._concurrency)
        if calls[0].alone:
            return Chunk(calls)
        watched = {call.function for call in calls if self._ways[call.function].watched}
        probes = self._canary.questions(watched)
        return Chunk([*calls, *probes], probes=len(probes))

    # ---- listening --------------------------------------------------------------------------------------------------

    def _listen(self, until: float) -> None:
        """Wait for something to happen, until a moment at the latest, and deal with it."""
        due = [self._deadline(executor) for executor in self._fleet.executors if executor.started and not executor.idle]
        lost = self._fleet.turn(min([until, *due]))
        for executor in list(self._fleet.executors):
            if executor in self._fleet.executors:  # still
                self._look_after(executor)
        for sandbox in lost:
            self._sandbox_ended(sandbox)

    def _deadline(self, executor: Executor) -> float:
        if executor.stack_until is not None:
            return executor.stack_until
        late = LATE_SECONDS if executor.chunks[0].concurrency else 0.0
        return executor.clock + self._fleet.limits.call_seconds + late

    def _look_after(self, executor: Executor) -> None:
        for chunk, call, place, result in executor.receive():
            self._take(executor, chunk, call, place, result)
            if executor not in self._fleet.executors:
                return
        now, limits = time.monotonic(), self._fleet.limits
        if executor.broken == "violated":
            self._violated(executor)
        elif executor.idle:
            if executor.ended or executor.broken:
                self._fleet.remove(executor)
        elif executor.ended:
            self._executor_ended(executor)
        elif executor.broken:
            if now > (executor.closing_since or now) + CLOSING_SECONDS:
                self._lost(executor, "crash", _said("the process closed its channel to the job", executor))
        elif executor.log.size > limits.output_bytes:
            self._lost(executor, "output_limit", f"printed more than {limits.output_bytes} bytes")
        elif executor.stack_until is None:
            if executor.started and now > self._deadline(executor):
                executor.ask_stack(now + STACK_SECONDS)
        elif now > executor.stack_until or executor.has_said_stack:
            self._lost(executor, "timeout", _said(f"no result after {limits.call_seconds:g} s", executor))

    def _take(self, executor: Executor, chunk: Chunk, call: Call, place: int, result: Result) -> None:
        self._fleet.came_back()
        executor.worn |= result.worn
        forked = self._ways[call.function].forked
        if result.outcome == "out_of_memory" and not forked:
            # Earlier calls may have filled the executor; a fresh one tells.
            self._lost(executor, "out_of_memory", result.error, result.prints, at_fault=[call])
            return
        if result.outcome == "crash":
            result = replace(result, error=_said(result.error, executor))
        chunk.done.append((call, place, result))
        if result.left_behind:
            self._settle_done(chunk)
            self._queue.again([call for chunk in executor.chunks for call in chunk.unfinished()])
            self._fleet.remove(executor)
        elif not chunk.waiting:
            self._finished(executor, chunk)

    def _finished(self, executor: Executor, chunk: Chunk) -> None:
        executor.chunks.remove(chunk)
        fresh = chunk.probes == len(chunk.calls)
        for call in chunk.calls[len(chunk.calls) - chunk.probes :]:
            results = [result for other, _, result in chunk.done if other is call]
            if not self._canary.heard(call, results, fresh=fresh) and not fresh:
                name = self._ways[call.function].function.name
                self._note(
                    f"a call had changed the process of reward function {name!r}: a question with a known answer was "
                    "answered in another way. The calls since then were run again, each in a fresh process"
                )
                self._queue.special.append([call])
                self._one_by_one(executor, [*chunk.calls, *_unfinished(executor)])
                return
        seconds = [result.seconds for call, _, result in chunk.done if call.places]
        self._settle_done(chunk)
        if seconds:
            self._fleet.pace += 0.2 * (sum(seconds) / len(seconds) - self._fleet.pace)
            self._canary.called_seconds += sum(seconds)
        if self._in_chunks or chunk.calls[0].alone:
            self._fleet.remove(executor)

    # ---- ends -------------------------------------------------------------------------------------------------------

    def _executor_ended(self, executor: Executor) -> None:
        assert executor.ended
        code, error = executor.ended
        if code is None:  # it never was
            self._fleet.failures.append(error)
            self._queue.again(_unfinished(executor))
            self._fleet.remove(executor)
            return
        killed = code == -signal.SIGKILL  # by itself, or for memory that another one took
        shared = killed and sum(not other.idle for other in self._fleet.executors) > 1
        if killed and executor.sandbox.ran_out_of_memory():
            self._lost(executor, "out_of_memory", "the sandbox ran out of memory", shared=shared)
        else:
            self._lost(executor, "crash", _said(frames.ending(code), executor), shared=shared)

    def _sandbox_ended(self, sandbox: Sandbox) -> None:
        """Any call that was under way may have done that."""
        reason = sandbox.broken or "the sandbox ended"
        members = [executor for executor in self._fleet.executors if executor.sandbox is sandbox]
        shared = sum(executor.started and not executor.idle for executor in members) > 1
        outcome = "out_of_memory" if sandbox.ran_out_of_memory() else "crash"
        for executor in members:
            if executor.idle or not executor.started:
                self._queue.again(_unfinished(executor))
            else:
                self._lost(executor, outcome, _said(reason, executor), shared=shared)
        self._fleet.lose(sandbox)

    def _lost(
        self,
        executor: Executor,
        outcome: str,
        error: str,
        prints: str = "",
        *,
        at_fault: list[Call] | None = None,
        shared: bool = False,
    ) -> None:
        """Its calls go on elsewhere. At fault is what was running; `shared`: or what was in other executors."""
        seconds = time.monotonic() - executor.clock
        chunk = executor.chunks[0]
        running = at_fault or chunk.running()
        others = [call for call in _unfinished(executor) if call not in running]
        self._fleet.remove(executor)
        if not running[0].places:  # a probe: what ran before it has done this, or it is a bad question
            calls = [] if chunk.probes == len(chunk.calls) else [call for call in chunk.calls if call not in running]
            self._one_by_one(executor, [*calls, *others])
            return
        self._settle_done(chunk, but=running)
        self._queue.again(others)
        for call in running:
            if len(running) == 1:
                call.killed = min(call.killed + 1, TRIES - 1) if shared else call.killed + 1
                call.exclusive |= shared
            if call.killed < TRIES:
                self._queue.by_itself(call)
            else:
                self._settle_all(call, Result(outcome, 0.0, seconds, prints, error))

    def _violated(self, executor: Executor) -> None:
        """Something wrote to the result channel that was not a result: nothing of this chunk can be believed."""
        chunks = list(executor.chunks)
        if not chunks:
            self._fleet.remove(executor)
        elif len(chunks) == 1 and len(chunks[0].calls) == 1:
            chunks[0].done.clear()
            self._lost(executor, "crash", BROKEN, at_fault=chunks[0].calls)
        else:
            calls = [call for chunk in chunks for call in chunk.calls]
            names = ", ".join(sorted({repr(self._ways[call.function].function.name) for call in calls}))
            self._note(
                f"something else wrote to the result channel of {names}: calls were run again, each in a fresh process"
            )
            self._one_by_one(executor, calls)

    def _one_by_one(self, executor: Executor, calls: Sequence[Call]) -> None:
        self._fleet.remove(executor)
        for call in dict.fromkeys(calls):
            if call.places:
                self._queue.by_itself(call)

    # ---- outcomes ---------------------------------------------------------------------------------------------------

    def _settle_done(self, chunk: Chunk, but: Sequence[Call] = ()) -> None:
        """What has come back of calls that have ended."""
        open_calls = {*chunk.unfinished(), *but}
        for call, place, result in chunk.done:
            if call.places and call not in open_calls:
                self._settle(call, place, result)
        chunk.done.clear()

    def _settle_all(self, call: Call, result: Result) -> None:
        for place in range(call.count):
            self._settle(call, place, result)

    def _settle(self, call: Call, place: int, result: Result) -> None:
        function = self._ways[call.function].function
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
        self.scores[call.places[place]] = Score(outcome, value, result.seconds, prints, error)


def _unfinished(executor: Executor) -> list[Call]:
    return [call for chunk in executor.chunks for call in chunk.unfinished()]


def _said(what: str, executor: Executor) -> str:
    """With what it wrote past the capture last: the stack of a late or dying call."""
    executor.log.drain()
    return f"{what}\n{executor.log.text()}".strip()
