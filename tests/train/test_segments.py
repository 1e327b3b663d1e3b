"""The reward log of a step: a row for every call, texts up to a size."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from job_runs import UUID, config, spec

from rewardsmith.rewards.outcomes import Score
from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.train import segments
from rewardsmith.train.artifacts import JobArtifacts
from rewardsmith.train.samples import Sample
from rewardsmith.train.segments import KEPT_CHARACTERS, Moment, write_segments

MOMENT = Moment(3, 0.5, "train", 2, 2)


def sample(number: int, **scores: Score) -> Sample:
    return Sample(Prompt(7, "p", [1], {}), number, Completion([3], [-0.5], "stop", "text"), scores, 1.0)


def written(tmp_path: Path, samples: list[Sample]) -> tuple[list[dict], dict[str, int]]:
    artifacts = JobArtifacts(spec(tmp_path, tmp_path, config()))
    files, cut = write_segments(artifacts, MOMENT, samples)
    (logs,) = [file for file in files if file.family == "reward_logs"]
    assert UUID in logs.path
    return pq.read_table(tmp_path / logs.path).to_pylist(), cut


def test_every_call_has_a_row_with_its_score_and_time(tmp_path: Path):
    samples = [
        sample(0, f=Score("ok", 0.5, 0.1), g=Score("ok", 1.0, 0.2, prints="hi\n")),
        sample(1, f=Score("abstain", None, 0.3), g=Score("exception", 0.0, 0.4, error="why")),
    ]
    rows, cut = written(tmp_path, samples)
    assert [
        (row["idx"], row["sample"], row["function"], row["outcome"], row["value"], row["seconds"]) for row in rows
    ] == [
        (0, 0, "f", "ok", 0.5, 0.1),
        (0, 0, "g", "ok", 1.0, 0.2),
        (1, 1, "f", "abstain", None, 0.3),
        (1, 1, "g", "exception", 0.0, 0.4),
    ]
    assert [(row["prints"], row["error"]) for row in rows] == [("", ""), ("hi\n", ""), ("", ""), ("", "why")]
    assert {(row["step"], row["revision"], row["row"], row["phase"]) for row in rows} == {(3, 2, 7, "train")}
    assert cut == {}


def test_texts_beyond_the_size_are_cut_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(segments, "LOG_CHARACTERS", 2000)
    samples = [
        sample(n, loud=Score("exception", 0.0, 0.1, error=f"{n}{'x' * 398}!"), quiet=Score("ok", 1.0, 0.1, "short"))
        for n in range(5)
    ]
    rows, cut = written(tmp_path, samples)
    assert cut == {"loud": 3}, "1000 characters each: two texts of 400, and all that quiet says"
    loud = [row["error"] for row in rows if row["function"] == "loud"]
    assert [len(text) for text in loud[:2]] == [400, 400]
    assert all(
        text.endswith("x" * (KEPT_CHARACTERS - 1) + "!") and "200 characters left out" in text for text in loud[2:]
    )
    assert [row["prints"] for row in rows if row["function"] == "quiet"] == ["short"] * 5


def test_a_text_that_comes_again_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(segments, "LOG_CHARACTERS", 1000)
    rows, cut = written(tmp_path, [sample(n, f=Score("exception", 0.0, 0.1, error="x" * 900)) for n in range(50)])
    assert cut == {} and all(row["error"] == "x" * 900 for row in rows)
