"""Dry runs: a change of a job's reward functions on completions that it has stored, in a reward pool of the server.

One at a time for a job and two for the whole server, a bounded number of completions, a bounded time. Only what the
change touches is called: scores of the other functions are in the store. `rewards.dry_run` has the arithmetic.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import cast

from rewardsmith import wire
from rewardsmith.errors import ConfigError, Conflict, RewardPoolError, RewardSourceError
from rewardsmith.reward_config import RewardFunctionsConfig, RewardFunctionsRuntimeConfig
from rewardsmith.rewards import dry_run, packages
from rewardsmith.rewards.dry_run import Change, Judged, Stored
from rewardsmith.rewards.grants import Grants
from rewardsmith.rewards.outcomes import Outcome, Score, total
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.server import changes
from rewardsmith.server.difference import difference
from rewardsmith.server.submission import as_revision
from rewardsmith.store import Store
from rewardsmith.wire.dry_run import MOST_COMPLETIONS

log = logging.getLogger("rewardsmith.server")

SECONDS = 60.0  # of scoring, for the new and the old functions together
SEARCH_SECONDS = 10.0  # for completions of chosen rows that were last sampled long ago
MOST_AT_ONCE = 2
PAGE = 500

Groups = list[list[Stored]]
Scores = list[list[dict[str, Score]]]


class Turns:
    """Who may run now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[str] = set()

    @contextmanager
    def turn(self, uuid: str) -> Iterator[None]:
        """Raises Conflict where there is none."""
        with self._lock:
            if uuid in self._running:
                raise Conflict("a dry run for this job is under way; wait for its end")
            if len(self._running) >= MOST_AT_ONCE:
                raise Conflict(f"{MOST_AT_ONCE} dry runs are under way on this server; try again in a minute")
            self._running.add(uuid)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(uuid)


def run(store: Store, job: wire.Job, request: wire.DryRunRequest, private_endpoints: Sequence[str] = ()) -> wire.DryRun:
    """Takes SECONDS or little more, and the time to install packages that are not there yet.

    Raises ConfigError, and RewardSourceError for what does not load.
    """
    begun = time.monotonic()
    wanted = changes.of_change(job, request)
    if not wanted.functions:
        raise ConfigError("without any reward function there is nothing to try")
    present = store.runs.revision(job.uuid, job.revision)
    new = as_revision(wanted)
    groups, missing, cut = _stored(store, job, request)
    to_run = new if request.rescore else _to_run(new, wanted, groups, store.runs.revisions(job.uuid))
    budget = SECONDS / 2 if request.rescore else SECONDS
    grants = Grants(store.secrets.of_job(job.uuid), private_endpoints)
    try:
        fresh, stopped = _score_within(to_run, wanted.runtime, groups, budget, grants)
        old = present.functions if request.rescore else []
        again, late = _score_within(old, _runtime(present), groups[: len(fresh)], budget, grants)
    except RewardPoolError as error:
        raise RewardSourceError(error.message) from None
    change = Change(
        diff=difference(present.functions, new, _runtime(present), wanted.runtime, old_number=present.revision),
        old=present.functions,
        new=new,
        ran=frozenset(function.name for function in to_run),
    )
    judged = _judged(groups[: len(again)], fresh, again if request.rescore else None, change, job.step + 1)
    rows = dry_run.with_pushes(judged, "batch" if job.params.get("advantage") == "reinforce_pp" else "group")
    every = [one for group in rows for one in group]
    functions, signal = dry_run.comparisons(every, change), dry_run.forecast(rows)
    return wire.DryRun(
        against=present.revision,
        scored_by=sorted({one.stored.revision for one in every}),
        diff=change.diff,
        first_step=min(one.stored.step for one in every),
        last_step=max(one.stored.step for one in every),
        completions=sum(len(group) for group in groups),
        scored=len(every),
        stopped=stopped or late or cut,
        missing_rows=missing,
        seconds=time.monotonic() - begun,
        findings=list(dry_run.findings(change, functions, signal)),
        total=dry_run.total_comparison(every),
        functions=functions,
        signal=signal,
        changes=dry_run.row_changes(every),
        failures=dry_run.failures(every, change.ran),
    )


def _to_run(
    functions: Sequence[wire.RevisionFunction],
    wanted: RewardFunctionsConfig,
    groups: Groups,
    revisions: Sequence[wire.Revision],
) -> list[wire.RevisionFunction]:
    """Those whose stored scores are not what they would give now: new ones, changed ones, those of another runtime."""
    by_number = {revision.revision: revision for revision in revisions}
    stored = [one for group in groups for one in group]
    scored_by = [by_number[number] for number in {one.revision for one in stored}]

    def right(function: wire.RevisionFunction) -> bool:
        return (
            all(_runtime(revision) == wanted.runtime for revision in scored_by)
            and all(any(function.scores_like(f) for f in revision.functions) for revision in scored_by)
            and all(one.scores[function.name].outcome != "infrastructure" for one in stored)
        )

    return [function for function in functions if not right(function)]


def _judged(groups: Groups, fresh: Scores, again: Scores | None, change: Change, next_step: int) -> list[list[Judged]]:
    """Old scores are the stored ones unless they were made `again`; new totals weigh as in the job's next step."""
    new_weights = {function.name: function.weight_at(next_step) for function in change.new}
    old_weights = {function.name: function.weight_at(next_step) for function in change.old}
    judged: list[list[Judged]] = []
    for g, group in enumerate(groups):
        judged.append([])
        for c, stored in enumerate(group):
            new = {f.name: fresh[g][c][f.name] if f.name in change.ran else stored.scores[f.name] for f in change.new}
            old = stored.scores if again is None else again[g][c]
            old_total = stored.total if again is None else total(old, old_weights)
            judged[-1].append(Judged(stored, old, new, old_total, total(new, new_weights)))
    return judged


def _runtime(revision: wire.Revision) -> RewardFunctionsRuntimeConfig:
    return RewardFunctionsRuntimeConfig(**revision.runtime)


def _score_within(
    functions: Sequence[wire.RevisionFunction],
    runtime: RewardFunctionsRuntimeConfig,
    groups: Groups,
    seconds: float,
    grants: Grants,
) -> tuple[Scores, str | None]:
    """The scores of the first groups, as many as `seconds` last for, and why these are not all.

    Raises RewardPoolError for functions that do not load, and when not even one group is scored in time.
    """
    if not functions:
        return [[{} for _ in group] for group in groups], None
    # Here a failure ends nothing; the findings say that it would end the job.
    harmless = [f.model_copy(update={"on_error": "zero"}) if f.on_error == "fail" else f for f in functions]
    scored: Scores = []
    with (
        packages.open_environment(runtime.packages, log.info) as environment,
        # One worker: the machine may be training, and a call's time is not to be that of waiting for a core.
        RewardPool(harmless, workers=1, runtime=runtime, site_dirs=environment.folders, grants=grants) as pool,
        _alarm(seconds, pool.interrupt) as rung,
    ):
        begun, size = time.monotonic(), 1
        while len(scored) < len(groups) and not rung.is_set():
            batch = groups[len(scored) : len(scored) + size]
            try:
                scored += pool.score([Group(g[0].prompt, g[0].example, [one.completion for one in g]) for g in batch])
            except RewardPoolError:
                if not rung.is_set():
                    raise
                break
            # In ever larger batches, but in none that may not be done in time: what is interrupted is lost.
            spent = max(time.monotonic() - begun, 1e-6)
            size = max(1, min(4 * size, int((seconds - spent) / 4 * len(scored) / spent)))
    if not scored:
        raise RewardPoolError(f"not even one group of completions could be scored in {seconds:g} s")
    if len(scored) < len(groups):
        return scored, f"scoring takes too long: {len(scored)} of {len(groups)} groups in {seconds:g} s"
    return scored, None


@contextmanager
def _alarm(seconds: float, act: Callable[[], None]) -> Iterator[threading.Event]:
    """After so many seconds the event is set, and then `act` called."""
    rung = threading.Event()

    def ring() -> None:
        rung.set()
        act()

    timer = threading.Timer(seconds, ring)
    timer.daemon = True
    timer.start()
    try:
        yield rung
    finally:
        timer.cancel()


# ---- what there is to score


def _stored(store: Store, job: wire.Job, request: wire.DryRunRequest) -> tuple[Groups, list[int], str | None]:
    """Whole groups, the newest step first; the chosen rows of which none was found; why these are not all.

    Raises ConfigError.
    """
    chosen, cut = _newest(store, job.uuid, request)
    groups = [list(group) for step in chosen for _, group in groupby(step, key=lambda row: _group_of(row, job))]
    missing = []
    for row in dict.fromkeys(request.rows):
        if any(group[0].row == row for group in groups):
            continue
        found = _newest_of_row(store, job.uuid, row)
        groups += [list(group) for _, group in groupby(found, key=lambda one: _group_of(one, job))]
        if not found:
            missing.append(row)
    if not groups:
        raise ConfigError("the job has no stored completions yet, so there is nothing to try it on; wait for step 1")
    examples = store.completions.examples(job.uuid, {group[0].row for group in groups})
    return [[_as_stored(row, examples[row.row]) for row in group] for group in groups], missing, cut


def _group_of(row: wire.CompletionRow, job: wire.Job) -> tuple[int, int, int]:
    return row.step, row.row, row.sample // int(job.params["num_generations"])


def _newest(store: Store, uuid: str, request: wire.DryRunRequest) -> tuple[list[list[wire.CompletionRow]], str | None]:
    """Whole steps, the newest first, and why these are not all that were asked for."""
    chosen: list[list[wire.CompletionRow]] = []
    count = 0
    for _, rows in groupby(_rows(store, uuid), key=lambda row: row.step):
        step = list(rows)
        if chosen and count + len(step) > MOST_COMPLETIONS:
            return chosen, f"a dry run takes {MOST_COMPLETIONS} completions at most: the newest {len(chosen)} steps"
        chosen.append(step)
        count += len(step)
        if len(chosen) == request.steps or (request.steps is None and count >= request.completions):
            break
    return chosen, None


def _newest_of_row(store: Store, uuid: str, row: int) -> list[wire.CompletionRow]:
    """Those of the last step that sampled it; none when that is not found in time."""
    rows = _rows(store, uuid, row, deadline=time.monotonic() + SEARCH_SECONDS)
    return next((list(found) for _, found in groupby(rows, key=lambda one: one.step)), [])


def _rows(
    store: Store, uuid: str, row: int | None = None, deadline: float = float("inf")
) -> Iterator[wire.CompletionRow]:
    after: str | None = None
    while time.monotonic() < deadline:
        page = store.completions.completions(uuid, phase="train", row=row, after=after, limit=PAGE)
        yield from map(wire.CompletionRow.model_validate, cast(Iterable[object], page.data))
        after = page.next
        if after is None:
            return


def _as_stored(row: wire.CompletionRow, example: dict[str, object]) -> Stored:
    return Stored(
        step=row.step,
        idx=row.idx,
        row=row.row,
        sample=row.sample,
        revision=row.revision,
        prompt=row.prompt,
        completion=row.completion,
        example=example,
        scores={
            name: Score(cast(Outcome, outcome), row.scores.get(name), row.seconds.get(name, 0.0))
            for name, outcome in row.outcomes.items()
        },
        total=row.total_reward,
    )
