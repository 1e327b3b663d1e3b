"""The revision before the present one, scored on for some steps with weight 0, to set old curves beside new ones.

Only functions that the new revision changed or took out are called, in a pool of one worker and in a thread of its own
while the update runs; the others have their scores already. Nothing here moves a weight, pauses or ends a job: what
fails or takes too long has no point in its curve, and a revision that always does is let go. The metrics are
`reward/<name>@<revision>/mean` and `total_reward@<revision>`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

from rewardsmith.errors import RewardPoolError
from rewardsmith.rewards.outcomes import Score, total
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.train.samples import Sample, as_group
from rewardsmith.wire import Revision

# How long a step's report waits for scores that are not there when everything else is: a share of the step's seconds,
# at least so many. What is late three times running is let go, so that little is lost by waiting.
PATIENCE, LEAST_SECONDS = 0.05, 0.25
LATE_STEPS = 3
CLOSING_SECONDS = 1.0

Groups = Sequence[Sequence[Sample]]


class Comparison:
    """`start` it, call `begin` when a step's completions are there and `metrics` for its report, `close` it."""

    def __init__(
        self, before: Revision, after: Revision, first_step: int, make_pool: Callable[[Revision], RewardPool]
    ) -> None:
        """`first_step` is the first one that `after` scores; `make_pool` is for what is left of `before`."""
        kept = {function.name: function for function in after.functions}
        self._before = before
        self._last_step = first_step + after.compared_steps - 1
        changed = [
            # A failure that would end the job counts as 0: this is not what the job is trained with any more.
            function.model_copy(update={"on_error": "zero"}) if function.on_error == "fail" else function
            for function in before.functions
            if function.name not in kept or not function.scores_like(kept[function.name])
        ]
        self._names = {function.name for function in changed}
        self._pool = make_pool(before.model_copy(update={"functions": changed})) if changed else None
        self._thread: threading.Thread | None = None
        self._step = 0
        self._scores: list[list[dict[str, Score]]] | None = None
        self._failure: str | None = None
        self._late = 0
        self._closing = threading.Event()

    def start(self) -> None:
        """Load the functions. Raises RewardPoolError."""
        if self._pool is not None:
            self._pool.start()

    def over(self, step: int) -> bool:
        return step > self._last_step

    def begin(self, step: int, groups: Groups) -> None:
        """Score a step's completions, unless those of an earlier one are still being scored."""
        if self._pool is None or self._busy:
            return
        self._step, self._scores = step, None
        to_score = [as_group(group[0].prompt, [sample.completion for sample in group]) for group in groups]
        # A daemon: a job that ends does not wait for a function that hangs.
        self._thread = threading.Thread(target=self._score, args=[to_score], name="comparison", daemon=True)
        self._thread.start()

    def metrics(self, step: int, groups: Groups, seconds: float) -> dict[str, float]:
        """What the old revision says of a step's completions, which took `seconds` so far. Waits, but not long."""
        if self._thread is not None:
            self._thread.join(max(LEAST_SECONDS, PATIENCE * seconds))
        if self._pool is not None and (self._busy or self._step != step or self._scores is None):
            self._late += 1
            return {}
        self._late = 0
        return dict(self._measured(step, groups))

    def verdict(self) -> str | None:
        """Why there is no use in going on; None while there is."""
        reason = self._failure
        if reason is None and self._late >= LATE_STEPS:
            reason = f"its functions took longer than {self._late} steps running"
        return reason and f"revision {self._before.revision} is no longer scored for comparison: {reason}"

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None and self._pool is not None:
            self._pool.interrupt()
            self._thread.join(CLOSING_SECONDS)
        if not self._busy:  # else its thread does it
            self._close_pool()

    @property
    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _score(self, groups: Sequence[Group]) -> None:
        assert self._pool is not None
        scores: list[list[dict[str, Score]]] = []
        try:
            for group in groups:
                if self._closing.is_set():
                    return
                scores += self._pool.score([group])
            self._scores = scores
        except RewardPoolError as error:
            if not self._closing.is_set():
                self._failure = error.message
        finally:
            if self._closing.is_set():
                self._close_pool()

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def _measured(self, step: int, groups: Groups) -> Iterator[tuple[str, float]]:
        number = self._before.revision
        by_completion = [
            self._old_scores(sample, self._scores[g][i] if self._scores else {})
            for g, group in enumerate(groups)
            for i, sample in enumerate(group)
        ]
        for name in self._names:
            values = [score.value for scores in by_completion if (score := scores[name]).value is not None]
            if values:
                yield f"reward/{name}@{number}/mean", fmean(value for value in values if value is not None)
        weights = {function.name: function.weight_at(step) for function in self._before.functions}
        totals = [amount for scores in by_completion if (amount := total(scores, weights)) is not None]
        if totals:
            yield f"total_reward@{number}", fmean(totals)

    def _old_scores(self, sample: Sample, fresh: Mapping[str, Score]) -> dict[str, Score]:
        """By every function of the old revision: what it scored just now, or what has not changed."""
        return {
            function.name: fresh[function.name] if function.name in self._names else sample.scores[function.name]
            for function in self._before.functions
        }


def goes_on(revision: Revision, step: int) -> bool:
    """Whether a run that takes up `revision` at `step` is within the steps that compare it with the one before."""
    begun = revision.effective_step
    return revision.replaces is not None and begun is not None and step < begun + revision.compared_steps
