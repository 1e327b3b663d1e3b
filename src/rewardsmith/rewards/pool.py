"""The one door to user code: `RewardPool.score` sends completions to sandboxed executors and brings back scores.

User code never runs in this process. Calls go out in chunks and their results come back one by one, so an executor that
dies or hangs names the call that did it: that call is tried once more, alone and in a fresh executor, and then gets its
outcome; the other calls of the chunk are sent again. Deadlines are kept from out here, by killing. This file has what
lives as long as the pool; `round` does the work of one `score`, `fleet` has the executors and their sandboxes, `modes`
says how long one is used, `outcomes` what comes back. Which scores stop a job is not decided here.
"""

from __future__ import annotations

import os
import site
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rewardsmith.errors import RewardPoolError
from rewardsmith.reward_config import RewardFunctionsRuntimeConfig
from rewardsmith.rewards import modes, source
from rewardsmith.rewards.calls import Group
from rewardsmith.rewards.egress import PROXY_VARIABLES, Egress, refuse_below
from rewardsmith.rewards.fleet import Fleet, available_workers
from rewardsmith.rewards.grants import Grants
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rewards.redact import redactor
from rewardsmith.rewards.round import Round
from rewardsmith.rewards.sandbox import probe, tiers
from rewardsmith.rewards.sandbox.limits import Limits
from rewardsmith.rewards.sandbox.tiers import Tier
from rewardsmith.rewards.sandbox.zygote import Source
from rewardsmith.wire import JOB_MARKER, RevisionFunction

__all__ = ["Group", "RewardPool", "available_workers"]


class RewardPool:
    """Executors that hold one revision's functions. Use it as a context manager, or `start` and `close` it.

    `score` may be called from any thread, one call at a time; `interrupt` from any thread. `runtime` is the part of the
    config that says how functions are run. `tier` is what the machine has, if not said. `site_dirs` have the packages
    that functions may import, by default those of this interpreter. Of the secrets in `grants` no text that comes out
    has a value in it.
    """

    def __init__(
        self,
        functions: Sequence[RevisionFunction],
        workers: int | None = None,
        limits: Limits | None = None,
        tier: Tier | None = None,
        runtime: RewardFunctionsRuntimeConfig | Mapping[str, Any] | None = None,
        site_dirs: Sequence[Path] | None = None,
        grants: Grants | None = None,
    ) -> None:
        if not isinstance(runtime, RewardFunctionsRuntimeConfig):
            runtime = RewardFunctionsRuntimeConfig(**(runtime or {}))
        self.functions = list(functions)
        self.workers = workers or available_workers()
        self.limits = limits or Limits(call_seconds=runtime.call_seconds)
        self.tier = tier
        self._runtime = runtime
        self._site_dirs = [Path(folder) for folder in (site.getsitepackages() if site_dirs is None else site_dirs)]
        self._grants = grants or Grants()
        self._redact = redactor(self._grants.secrets)
        self._egress: Egress | None = None
        self._ways: list[modes.Way] = []
        self._fleet: Fleet | None = None
        self._canary = modes.Canary()
        self._notes: Counter[str] = Counter()
        self._turns = threading.Lock()
        self._interrupted = False

    def start(self) -> None:
        """Check the functions, load them in a sandbox, fork the executors.

        Raises RewardPoolError naming function, line and reason, and SandboxError where this machine must not run user
        code; the pool is closed then.
        """
        for function in self.functions:
            problems = source.check(function.source, per=function.per)
            if problems:
                reasons = "\n".join(str(problem) for problem in problems)
                raise RewardPoolError(f"reward function {function.name!r}: {reasons}")
        self._ways = [modes.Way.of(function, self._runtime.mode) for function in self.functions]
        if self._runtime.mode == "auto":
            self._say_what_is_forked()
        if self.tier is None:
            self.tier = probe.required(*tiers.policy())
            if self.tier == Tier.S0:
                self._note(
                    f"UNSAFE: no sandbox keeps the reward functions in; not stopped: {tiers.MEANING[Tier.S0][1]}"
                )
        sources = [Source(way.function.name, way.function.source, way.forked) for way in self._ways]
        environment = {**self._grants.secrets}
        if JOB_MARKER in os.environ:
            environment[JOB_MARKER] = os.environ[JOB_MARKER]
        if self._runtime.network:
            refuse_below(self.tier)
            self._egress = Egress(self._runtime.network, self._grants.private_endpoints)
            environment |= PROXY_VARIABLES
        self._fleet = Fleet(
            sources, self.workers, self.tier, self.limits, self._site_dirs, environment, self._egress, self._note
        )
        try:
            with self._redacted():
                self._fleet.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Wait for a `score` that runs, end the executors and all they started, remove their files."""
        with self._turns:
            if self._fleet:
                self._fleet.stop()
            if self._egress:
                self._egress.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def score(self, groups: Sequence[Group]) -> list[list[dict[str, Score]]]:
        """For each group, for each completion, the score by function name.

        Raises RewardPoolError when the pool is closed or interrupted, when a function with on_error="fail" fails, and
        when sandboxes end again and again.
        """
        with self._turns:
            if self._fleet is None or self._fleet.stopped:
                raise RewardPoolError("the reward pool is closed")
            self._interrupted, self._fleet.failures = False, []
            round_ = Round(groups, self._ways, self._fleet, self._canary, self._runtime.concurrency, self._note)
            with self._redacted():
                round_.run(lambda: self._interrupted)
            if self._grants.secrets:
                round_.scores = {place: self._without_secrets(score) for place, score in round_.scores.items()}
            return [
                [
                    {function.name: round_.scores[g, c, f] for f, function in enumerate(self.functions)}
                    for c in range(len(group.completions))
                ]
                for g, group in enumerate(groups)
            ]

    def interrupt(self) -> None:
        """Make a `score` that runs in another thread raise RewardPoolError soon; later ones work again."""
        self._interrupted = True

    def take_notes(self) -> list[str]:
        """What a user should know of how the functions were run, since this was last asked."""
        while self._egress and self._egress.refusals:
            self._note(self._egress.refusals.popleft())
        notes, self._notes = self._notes, Counter()
        said = [text if count == 1 else f"{text} ({count} times)" for text, count in notes.items()]
        return list(map(self._redact, said))

    @contextmanager
    def _redacted(self) -> Iterator[None]:
        try:
            yield
        except RewardPoolError as error:
            raise RewardPoolError(self._redact(error.message)) from None

    def _without_secrets(self, score: Score) -> Score:
        if not score.prints and not score.error:
            return score
        error = score.error and self._redact(score.error)
        return replace(score, prints=self._redact(score.prints), error=error)

    def _note(self, text: str) -> None:
        self._notes[text] += 1

    def _say_what_is_forked(self) -> None:
        for way in self._ways:
            if reason := modes.runs_text(way.function.source):
                self._note(
                    f"reward function {way.function.name!r} uses {reason}, which can run text of the model: each call "
                    "of it gets a process of its own (mode 'auto')"
                )
