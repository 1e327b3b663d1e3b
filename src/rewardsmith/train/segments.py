"""A step's completions and reward logs as immutable Parquet files (zstd); the server reads them by column name.

A segment counts when the step's report, which lists it, was committed. Reward logs have a row for every call. What
calls printed and how they failed is kept up to a size for each step; beyond it a text is cut, which is counted.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rewardsmith.train.artifacts import JobArtifacts
from rewardsmith.train.samples import Sample
from rewardsmith.wire import Segment

Phase = Literal["train", "eval"]

# Of different texts in one step and phase, in equal parts for its functions; one that comes again is stored once.
LOG_CHARACTERS = 4 * 2**20
KEPT_CHARACTERS = 200  # of a text that is cut

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


def write_segments(
    artifacts: JobArtifacts, moment: Moment, samples: Sequence[Sample]
) -> tuple[list[Segment], dict[str, int]]:
    """Writes the two files of a step and phase; also gives how many calls had their text cut, by function."""
    if not samples:
        return [], {}
    completions = [_completion_row(moment, idx, sample) for idx, sample in enumerate(samples)]
    logs, cut = _log_rows(moment, samples)
    written = [_write(artifacts, moment, "completions", COMPLETIONS, completions)]
    if logs:
        written.append(_write(artifacts, moment, "reward_logs", REWARD_LOGS, logs))
    return written, cut


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


def _log_rows(moment: Moment, samples: Sequence[Sample]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    share = LOG_CHARACTERS // max(1, len(samples[0].scores))
    room: dict[str, int] = {}
    stored: set[tuple[str, str, str]] = set()
    cut: Counter[str] = Counter()
    rows = []
    for idx, sample in enumerate(samples):
        for name, score in sample.scores.items():
            prints, error = _storable(score.prints), _storable(score.error or "")
            if (prints or error) and (name, prints, error) not in stored:
                left = room.get(name, share) - len(prints) - len(error)
                if left < 0:
                    prints, error = _shortened(prints), _shortened(error)
                    cut[name] += 1
                else:
                    room[name] = left
                    stored.add((name, prints, error))
            rows.append(
                _where(moment, idx, sample)
                | {
                    "function": name,
                    "outcome": score.outcome,
                    "value": score.value,
                    "seconds": score.seconds,
                    "prints": prints,
                    "error": error,
                }
            )
    return rows, dict(cut)


def _shortened(text: str) -> str:
    """The end of it: there a traceback names its error."""
    lost = len(text) - KEPT_CHARACTERS
    return text if lost <= 0 else f"[{lost} characters left out: the log of this step is full] {text[lost:]}"


def _storable(text: str) -> str:
    """JSON can carry halves of surrogate pairs, UTF-8 cannot."""
    return text.encode(errors="replace").decode()
