"""What the doors make, run where rewards run: with the standard library alone, in a sandbox, through the pool."""

import json
from typing import Any

import foreign_rewards as foreign

from rewardsmith import RewardFunction
from rewardsmith.rewards.doors import from_openai_grader, from_trl, from_verifiers, from_verl
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rewards.pool import Group, RewardPool
from rewardsmith.wire import RevisionFunction


def scored(functions: dict[str, RewardFunction], row: dict[str, Any], completions: list[str]) -> list[dict[str, Score]]:
    of_revision = [
        RevisionFunction(name=name, source=each.source, source_sha256="", per=each.per, none=each.none)
        for name, each in functions.items()
    ]
    with RewardPool(of_revision, workers=1) as pool:
        (found,) = pool.score([Group("the prompt", row, completions)])
    return found


def test_every_door_at_once() -> None:
    grader = {
        "type": "multi",
        "name": "m",
        "graders": {
            "near": {
                "type": "text_similarity",
                "input": "{{sample.output_text}}",
                "reference": "{{item.solution}}",
                "evaluation_metric": "fuzzy_match",
            },
            "long": {"type": "python", "source": "import math\n\ndef grade(sample, item):\n    return math.sqrt(4)\n"},
        },
        "calculate_output": "near * long",
    }
    functions = {
        "accuracy": from_trl(foreign.accuracy),
        "format": from_trl(foreign.strict_format, chat=True),
        "ranked": from_trl(foreign.with_a_class, per="group"),
        "later": from_trl(foreign.later),
        "boxed": from_verl(foreign.boxed_score, column="solution"),
        "remote": from_verl(foreign.remote_score, reward_kwargs={"url": "good"}, column="solution"),
        "diverse": from_verifiers(foreign.diversity),
        "length": from_verifiers(foreign.length_of),
        "grader": from_openai_grader(grader),
    }
    row = {"solution": "12", "extra_info": {"index": 1}}
    texts = ["12", r"\boxed{12}", "12"]
    first, second, third = scored(functions, row, texts)
    assert {name: score.outcome for name, score in first.items()} == dict.fromkeys(functions, "ok"), first
    assert {name: score.value for name, score in first.items()} == {
        "accuracy": 1.0,
        "format": 0.0,
        "ranked": 2.0 * len("kept\nas it is"),
        "later": 2.0,
        "boxed": -1.0,
        "remote": 0.5,
        "diverse": 0.5,
        "length": 2.0 + 6,
        "grader": 2.0,
    }
    assert (second["boxed"].value, second["diverse"].value) == (1.0, 1.0)
    assert json.loads(second["boxed"].prints) == {"acc": True, "pred": "12", "source": ""}
    assert {name: score.value for name, score in third.items()} == {name: score.value for name, score in first.items()}


def test_no_opinion_leaves_the_completion_out_and_a_final_failure_is_an_error() -> None:
    functions = {
        "accuracy": from_trl(foreign.accuracy),
        "remote": from_verl(foreign.remote_score, reward_kwargs={"url": "bad"}, column="solution"),
    }
    ((score),) = scored(functions, {"solution": "no number"}, ["x"])
    assert (score["accuracy"].outcome, score["accuracy"].value) == ("abstain", None)
    assert score["remote"].outcome == "exception"
    assert "ConnectionError: no answer of bad" in (score["remote"].error or "")
