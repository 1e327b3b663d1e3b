"""Runs reward functions over groups of completions and over probes, and makes a report of what they said.

User code runs in the pool only. Everything is scored twice, to see whether a function says the same again. An
`on_error="fail"`, which ends a job, counts as "zero" here, so that one failure does not hide the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ConfigError
from rewardsmith.reward_config import RewardFunctionsRuntimeConfig
from rewardsmith.rewards.outcomes import Score, gist, total
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.rewards.workbench import measures
from rewardsmith.rewards.workbench.faults import Call, Origin, failed, fold
from rewardsmith.rewards.workbench.findings import find
from rewardsmith.rewards.workbench.measures import NEAR_BEST, TOTAL, Value, known
from rewardsmith.rewards.workbench.probes import PROBES, REFERENCE, probes
from rewardsmith.rewards.workbench.report import Agreement, FunctionReport, ProbeScore, Report, Scores, Seconds
from rewardsmith.wire import RevisionFunction


@dataclass
class Answers:
    """Texts for one prompt and what each scoring said of them, by function. `kinds` names the probe of each text."""

    row: int
    group: Group
    kinds: Sequence[str] = ()
    first: list[dict[str, Score]] = field(default_factory=list)
    again: list[dict[str, Score]] = field(default_factory=list)

    @property
    def texts(self) -> Sequence[str]:
        return self.group.completions


def examine(
    functions: Sequence[RevisionFunction],
    groups: Sequence[Group],
    *,
    rows: Sequence[int] | None = None,
    config: GRPOConfig | None = None,
    runtime: RewardFunctionsRuntimeConfig | None = None,
    site_dirs: Sequence[Path] | None = None,
    origins: Mapping[str, Origin] | None = None,
    source: str = "as given",
    notes: Sequence[str] = (),
    notice: Callable[[str], None] = lambda message: None,
) -> Report:
    """What `functions` say of the completions in `groups`; where these have none, there are the probes only.

    `rows` are the numbers of the groups' rows in the dataset; a row of several groups is probed once. `config` says
    how large a group and a step of the job are, `runtime` how functions are run. `origins`: where the text of a
    function begins in the user's file. `source` says where the completions come from. Raises ConfigError without
    functions or groups, RewardPoolError when a function cannot be loaded, and SandboxError where this machine must not
    run user code.
    """
    if not functions or not groups:
        raise ConfigError("there is no reward function to test" if groups else "there is no row to test on")
    config = config or GRPOConfig()
    answers = [Answers(row, group) for row, group in zip(rows or range(len(groups)), groups, strict=True)]
    asked = _probing({answer.row: answer.group for answer in reversed(answers)}, functions)
    given = [answer for answer in answers if answer.texts]
    completions, texts = (sum(len(answer.texts) for answer in answers) for answers in (given, asked))
    notice(f"scoring {completions} completions and {texts} probes with {len(functions)} function(s), twice")
    lenient = [f.model_copy(update={"on_error": "zero"}) if f.on_error == "fail" else f for f in functions]
    with RewardPool(lenient, runtime=runtime, site_dirs=site_dirs) as pool:
        _score(pool, [*given, *asked])
        workers, said = pool.workers, pool.take_notes()

    weights = {function.name: function.weight_at(1) for function in functions}
    values = {name: _values(given, name, weights) for name in [*weights, TOTAL]}
    ends = {name: _ends(values[name], asked, name, weights) for name in values}
    judged = given or asked
    report = Report(
        source=source if given else "none",
        rows=len(asked),
        completions=completions,
        group_size=config.num_generations,
        batch=config.effective_batch_size,
        workers=workers,
        functions=[
            _function(function, judged, values[function.name], config, workers, (origins or {}).get(function.name))
            for function in functions
        ],
        total=_scores(values[TOTAL], config.num_generations),
        agreements=[
            Agreement(one, other, *measures.rank_correlation(values[one], values[other]))
            for one, other in combinations(weights, 2)
        ],
        probes=[score for name in _probed(functions) for score in _probe_scores(asked, name, weights, ends[name])],
        ends=ends,
        notes=[*notes, *_remarks(functions), *said],
    )
    return replace(report, findings=find(report))


def _probed(functions: Sequence[RevisionFunction]) -> list[str]:
    """A function that compares a prompt's completions with each other says nothing of a probe, nor does its total."""
    total_too = all(function.per == "completion" for function in functions if function.weight_at(1))
    return [function.name for function in functions if function.per == "completion"] + [TOTAL] * total_too


def _remarks(functions: Sequence[RevisionFunction]) -> Iterator[str]:
    if names := [function.name for function in functions if function.schedule]:
        yield f"Weights change by a schedule ({', '.join(names)}); those of step 1 count here."
    if names := [function.name for function in functions if function.per == "group"]:
        yield f"Scored by group and therefore not probed: {', '.join(names)}."


# ---- running --------------------------------------------------------------------------------------------------------


def _probing(of_row: Mapping[int, Group], functions: Sequence[RevisionFunction]) -> list[Answers]:
    rows = sorted(of_row)
    made = probes([of_row[row] for row in rows], [function.source for function in functions])
    return [
        Answers(
            row,
            Group(of_row[row].prompt, of_row[row].example, [text for of_kind in texts.values() for text in of_kind]),
            kinds=[kind for kind, of_kind in texts.items() for _ in of_kind],
        )
        for row, texts in zip(rows, made, strict=True)
    ]


def _score(pool: RewardPool, answers: Sequence[Answers]) -> None:
    """Fills in both scorings."""
    first, again = (pool.score([answer.group for answer in answers]) for _ in range(2))
    for answer, one, other in zip(answers, first, again, strict=True):
        answer.first, answer.again = one, other


# ---- measuring ------------------------------------------------------------------------------------------------------


def _value(scores: Mapping[str, Score], name: str, weights: Mapping[str, float]) -> Value:
    return total(scores, weights) if name == TOTAL else scores[name].value


def _values(answers: Sequence[Answers], name: str, weights: Mapping[str, float]) -> list[list[Value]]:
    return [[_value(scores, name, weights) for scores in answer.first] for answer in answers]


def _scores(values_PG: measures.Values, group_size: int) -> Scores:
    everything = [value for values in values_PG for value in values]
    values = known(everything)
    no_signal, basis = measures.share_of_silence(values_PG, group_size)
    all_lowest, all_highest = measures.shares_at_the_ends(values_PG)
    return Scores(
        values=len(values),
        missing=len(everything) - len(values),
        mean=fmean(values) if values else None,
        lowest=min(values, default=None),
        highest=max(values, default=None),
        spread=measures.spread(values_PG),
        groups=len(measures.comparable(values_PG)),
        constant_groups=measures.share_of_constant(values_PG),
        no_signal=no_signal,
        basis=basis,
        all_lowest=all_lowest,
        all_highest=all_highest,
    )


def _function(
    function: RevisionFunction,
    judged: Sequence[Answers],
    values_PG: measures.Values,
    config: GRPOConfig,
    workers: int,
    origin: Origin | None,
) -> FunctionReport:
    name = function.name
    calls = [
        Call(answer.row, text, scores[name])
        for answer in judged
        for text, scores in zip(answer.texts, answer.first, strict=True)
    ]
    pairs = [
        (one[name], other[name]) for answer in judged for one, other in zip(answer.first, answer.again, strict=True)
    ]
    seconds = [call.score.seconds for call in calls]
    return FunctionReport(
        name=name,
        weight=function.weight_at(1),
        on_error=function.on_error,
        calls=len(calls),
        outcomes=dict(Counter(call.score.outcome for call in calls)),
        scores=_scores(values_PG, config.num_generations),
        seconds=Seconds(
            p50=measures.percentile(seconds, 0.5),
            p95=measures.percentile(seconds, 0.95),
            p99=measures.percentile(seconds, 0.99),
            per_step=measures.seconds_per_step([fmean(seconds)], config.effective_batch_size, workers),
        ),
        differing=fmean((a.outcome, a.value) != (b.outcome, b.value) for a, b in pairs),
        noise=measures.noise(
            [[scores[name].value for scores in answer.first] for answer in judged],
            [[scores[name].value for scores in answer.again] for answer in judged],
        ),
        faults=fold(calls, origin),
    )


def _ends(
    values_PG: measures.Values, asked: Sequence[Answers], name: str, weights: Mapping[str, float]
) -> tuple[float, float] | None:
    completions = known(value for values in values_PG for value in values)
    by_kind = [
        (kind, value)
        for answer in asked
        for kind, value in zip(answer.kinds, _values([answer], name, weights)[0], strict=True)
        if value is not None
    ]
    reference = [value for kind, value in by_kind if kind == REFERENCE]
    return measures.ends(completions, reference, [*completions, *(value for _, value in by_kind)])


def _probe_scores(
    asked: Sequence[Answers], name: str, weights: Mapping[str, float], ends: tuple[float, float] | None
) -> Iterator[ProbeScore]:
    for kind in PROBES:
        best: list[tuple[Value, int, str]] = []  # of each row: the best value of its texts, the row, that text
        failures: list[Score] = []
        for answer in asked:
            values = _values([answer], name, weights)[0]
            chosen = [place for place, of_kind in enumerate(answer.kinds) if of_kind == kind]
            if chosen:
                place = max(chosen, key=lambda i: -math.inf if (value := values[i]) is None else value)
                best.append((values[place], answer.row, answer.texts[place]))
            if name != TOTAL:
                failures += [score for i in chosen if failed(score := answer.first[i][name])]
        if not best:
            continue
        numbers = known(value for value, _, _ in best)
        merits = [0.0 if ends is None or value is None else measures.merit(value, ends) for value, _, _ in best]
        good = [merit >= NEAR_BEST for merit in merits]
        _, row, text = best[good.index(True) if any(good) else 0]
        yield ProbeScore(
            function=name,
            probe=kind,
            rows=len(best),
            mean=fmean(numbers) if numbers else None,
            highest=max(numbers, default=None),
            merit=None if ends is None else fmean(merits),
            reached=None if ends is None else fmean(good),
            failed=len(failures),
            error=gist(failures[0]) if failures else "",
            row=row,
            text=text,
            missed=None if all(good) else best[good.index(False)][1],
        )
