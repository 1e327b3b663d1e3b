"""The numbers of a step, under the names of design section 7. One that is not known has no entry, never a stand-in.

`seconds/report` is the writing of the step's segments and the sending of the report before; `seconds/wait` is waiting,
for the server or the end of a pause, since that report. `seconds/evaluate` is there when held-out rows were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

from rewardsmith.train.agreement import Mismatch
from rewardsmith.train.checkpoint import Progress
from rewardsmith.train.samples import Sample
from rewardsmith.train.update import Update


def step_metrics(
    groups: Sequence[Sequence[Sample]],
    update: Update,
    mismatch: Mismatch,
    progress: Progress,
    seconds: dict[str, float],
) -> dict[str, float]:
    """All but `epoch` and those of an evaluation. Takes the totals into `progress.lowest` and `.highest`."""
    samples = [sample for group in groups for sample in group]
    tokens = sum(len(sample.completion.ids) for sample in samples)
    busy = sum(seconds.get(name, 0.0) for name in ("generate", "score", "update", "deliver"))
    metrics = {
        **_rewards(samples),
        **_groups(groups, progress),
        **_completions(groups),
        "mismatch/kl": mismatch.kl,
        "mismatch/logp_max_diff": mismatch.max_difference,
        "clip_ratio/low": update.clipped_low,
        "clip_ratio/high": update.clipped_high,
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "learning_rate": update.learning_rate,
        "tokens": float(tokens),
        "tokens_per_second": tokens / max(busy, 1e-9),
        **{f"seconds/{name}": value for name, value in seconds.items()},
    }
    return metrics if update.kl is None else metrics | {"kl": update.kl}


def held_out_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    means = {f"eval/{name}": fmean(values) for name in _functions(samples) if (values := _values(samples, name))}
    totals = [sample.total for sample in samples if sample.total is not None]
    return means | ({"eval/total_reward": fmean(totals)} if totals else {})


def _rewards(samples: Sequence[Sample]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    totals = [sample.total for sample in samples if sample.total is not None]
    if totals:
        metrics |= {"total_reward": fmean(totals), "total_reward_std": pstdev(totals)}
    for name in _functions(samples):
        scores = [sample.scores[name] for sample in samples]
        seconds = sorted(score.seconds for score in scores)
        metrics[f"reward/{name}/error_rate"] = fmean(score.failed for score in scores)
        metrics[f"reward/{name}/seconds_p95"] = seconds[round(0.95 * (len(seconds) - 1))]
        if values := _values(samples, name):
            metrics |= {f"reward/{name}/mean": fmean(values), f"reward/{name}/std": pstdev(values)}
    return metrics


def _groups(groups: Sequence[Sequence[Sample]], progress: Progress) -> dict[str, float]:
    """Groups that teach nothing, and groups whose totals all are the best, or the worst, seen so far."""
    totals = [sample.total for group in groups for sample in group if sample.total is not None]
    progress.lowest = min([*totals, *_known(progress.lowest)], default=None)
    progress.highest = max([*totals, *_known(progress.highest)], default=None)
    spread = progress.lowest != progress.highest
    ends = [
        (min(known), max(known))
        for group in groups
        if (known := [sample.total for sample in group if sample.total is not None])
    ]
    return {
        "group/frac_zero_signal": sum(not any(sample.advantage for sample in group) for group in groups) / len(groups),
        "group/frac_all_best": sum(spread and lowest == progress.highest for lowest, _ in ends) / len(groups),
        "group/frac_all_worst": sum(spread and highest == progress.lowest for _, highest in ends) / len(groups),
    }


def _completions(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """`entropy` is estimated by the mean of -log p over the sampled tokens, at the sampling temperature, in nats."""
    completions = [sample.completion for group in groups for sample in group]
    lengths = [len(completion.ids) for completion in completions]
    different = sum(len({sample.completion.text for sample in group}) for group in groups)
    return {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean(completion.finish_reason == "length" for completion in completions),
        "completions/duplicate_ratio": 1 - different / len(completions),
        "entropy": -fmean(logp for completion in completions for logp in completion.logps),
    }


def _functions(samples: Sequence[Sample]) -> list[str]:
    return list(samples[0].scores) if samples else []


def _values(samples: Sequence[Sample], name: str) -> list[float]:
    return [value for sample in samples if (value := sample.scores[name].value) is not None]


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]
