"""A step's completions and reward logs as immutable Parquet files (zstd); the server reads them by column name.

A segment counts when the step's report, which lists it, was committed. Reward logs hold the calls that printed or
failed; the scores of all calls stand with the completions.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rewardsmith.train.artifacts import JobArtifacts
from rewardsmith.train.samples import Sample
from rewardsmith.wire import Segment

Phase = Literal["train", "eval"]

_WHERE = [
    ("step", pa.int32()),
    ("idx", pa.int32()),
    ("epoch", pa.float64()),
    ("phase", pa.string()),
    ("row", pa.int32()),
    ("sample", pa.int32()),
]
_SCORE = pa.struct([("value", pa.float64()), ("outcome", pa.string()), ("seconds", pa.float64())])
COMPLETIONS = pa.schema(
    [
        *_WHERE,
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("total_reward", pa.float64()),
        ("advantage", pa.float64()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
        ("revision", pa.int32()),
        ("policy_version", pa.int32()),
        ("scores", pa.map_(pa.string(), _SCORE)),
    ]
)
REWARD_LOGS = pa.schema(
    [
        *_WHERE,
        ("function", pa.string()),
        ("revision", pa.int32()),
        ("outcome", pa.string()),
        ("value", pa.float64()),
        ("seconds", pa.float64()),
        ("prints", pa.string()),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Moment:
    """When samples were taken. `policy_version` counts the updates of the adapter that sampled them."""

    step: int
    epoch: float
    phase: Phase
    revision: int
    policy_version: int


def write_segments(artifacts: JobArtifacts, moment: Moment, samples: Sequence[Sample]) -> list[Segment]:
    """Writes the non-empty ones of the two files of a step and phase."""
    completions = [_completion_row(moment, idx, sample) for idx, sample in enumerate(samples)]
    logs = [row for idx, sample in enumerate(samples) for row in _log_rows(moment, idx, sample)]
    written = []
    if completions:
        written.append(_write(artifacts, moment, "completions", COMPLETIONS, completions))
    if logs:
        written.append(_write(artifacts, moment, "reward_logs", REWARD_LOGS, logs))
    return written


def _write(
    artifacts: JobArtifacts,
    moment: Moment,
    family: Literal["completions", "reward_logs"],
    schema: pa.Schema,
    rows: list[dict[str, Any]],
) -> Segment:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    content = buffer.getvalue()
    path = artifacts.path(f"segments/{family}", f"{moment.phase}-{moment.step:07d}", ".parquet")
    artifacts.put(path, content)
    return Segment(
        family=family,
        phase=moment.phase,
        step=moment.step,
        rows=len(rows),
        bytes=len(content),
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _where(moment: Moment, idx: int, sample: Sample) -> dict[str, Any]:
    return {
        "step": moment.step,
        "idx": idx,
        "epoch": moment.epoch,
        "phase": moment.phase,
        "row": sample.prompt.row,
        "sample": sample.number,
        "revision": moment.revision,
    }


def _completion_row(moment: Moment, idx: int, sample: Sample) -> dict[str, Any]:
    scores = [
        (name, {"value": score.value, "outcome": score.outcome, "seconds": score.seconds})
        for name, score in sample.scores.items()
    ]
    return _where(moment, idx, sample) | {
        "prompt": _storable(sample.prompt.text),
        "completion": _storable(sample.completion.text),
        "total_reward": sample.total,
        "advantage": sample.advantage,
        "finish_reason": sample.completion.finish_reason,
        "tokens": len(sample.completion.ids),
        "policy_version": moment.policy_version,
        "scores": scores,
    }


def _log_rows(moment: Moment, idx: int, sample: Sample) -> Iterator[dict[str, Any]]:
    for name, score in sample.scores.items():
        if score.prints or score.error or score.failed:
            yield _where(moment, idx, sample) | {
                "function": name,
                "outcome": score.outcome,
                "value": score.value,
                "seconds": score.seconds,
                "prints": _storable(score.prints),
                "error": _storable(score.error or ""),
            }


def _storable(text: str) -> str:
    """JSON can carry halves of surrogate pairs, UTF-8 cannot."""
    return text.encode(errors="replace").decode()
