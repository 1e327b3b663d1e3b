"""A job whose engine does not run the policy ends within one step, with a message that names the cause."""

import re
import threading
from pathlib import Path

import pytest
import torch
from job_runs import LONG, UUID, config, finish, spec
from peft.tuners.lora import LoraLayer
from scripted_server import TOKEN, ScriptedServer

from rewardsmith.config import GRPOConfig
from rewardsmith.errors import DeliveryError
from rewardsmith.jobs.entry import run_job
from rewardsmith.train import learner
from rewardsmith.train.agreement import LIMITS, Mismatch, probed
from rewardsmith.train.parallel.ranks import Ranks


class FaultyRanks(Ranks):
    """Delivers policy versions 0 and 1 as it should, the others as `fault` says."""

    def __init__(self, fault, workers: int = 0) -> None:
        super().__init__(workers)
        self.fault = fault

    def load_adapter(self, tensors, version) -> None:
        if version < 2:
            super().load_adapter(tensors, version)
        else:
            self.fault(self, tensors, version)


def not_delivered(ranks: FaultyRanks, tensors, version) -> None:
    """As if the message was lost."""


def not_merged(ranks: FaultyRanks, tensors, version) -> None:
    ranks._own.engine.take_adapter(tensors, version)
    ranks._own.weights.verify(version)


def merged_in_some_layers(ranks: FaultyRanks, tensors, version) -> None:
    ranks._own.engine.take_adapter(tensors, version)
    ranks._own.weights.merge(0, 2)
    ranks._own.weights.verify(version)


def merged_twice_as_strongly(ranks: FaultyRanks, tensors, version) -> None:
    projections = ranks._own.weights.projections
    ranks._own.engine.take_adapter(tensors, version)
    for projection in projections:
        projection.scaling *= 2
    ranks._own.merge()
    for projection in projections:
        projection.scaling /= 2
    ranks._own.weights.verify(version)


def merged_into_the_base(ranks: FaultyRanks, tensors, version) -> None:
    """What loses a base model bit by bit: the adapter is added in place and taken out again."""
    ranks._own.engine.take_adapter(tensors, version)
    for projection in ranks._own.weights.projections:
        for part in projection.bound:
            change = projection.scaling * part.b_OR @ part.a_RI
            projection.base_OI[part.start : part.stop] += change
            projection.base_OI[part.start : part.stop] -= change
    ranks._own.merge()
    ranks._own.weights.verify(version)


def applied_twice_as_strongly_by_the_trainer(ranks: FaultyRanks, tensors, version) -> None:
    """Nothing is wrong with what was delivered; the policy that is trained is another one."""
    Ranks.load_adapter(ranks, tensors, version)
    for module in ranks.trained.modules():
        if isinstance(module, LoraLayer):
            module.scaling["policy"] *= 4


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (not_delivered, "the engine does not run policy version 2: of its 28 adapter tensors, 28 different"),
        (not_merged, "the merged weights of .* were not rebuilt since the adapter changed"),
        (merged_in_some_layers, "the merged weights of .* were not rebuilt since the adapter changed"),
        (merged_twice_as_strongly, r"the adapter was merged times 4(\.\d+)?, not 2"),
        (merged_into_the_base, "the base weights of .* changed since they were loaded"),
        (applied_twice_as_strongly_by_the_trainer, "engine and trainer do not run the same policy.* in step 3"),
    ],
)
def test_a_delivery_that_went_wrong_halts_the_job(
    fault, says: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    attach = learner.lora.attach

    with FaultyRanks(fault) as ranks:

        def attached(*arguments):
            ranks.trained = attach(*arguments)
            return ranks.trained

        monkeypatch.setattr(learner.lora, "attach", attached)
        with ScriptedServer(spec(folder, model, config(train_steps=LONG, learning_rate=0.02))) as server:
            run_job({"url": server.url, "uuid": UUID, "fence": 1, "token": TOKEN}, threading.Event(), ranks)
    assert finish(server)["status"] == "errored"
    assert re.search(says, finish(server)["error"]), finish(server)["error"]
    steps = [body["step"] for body in server.bodies("report")]
    assert max(steps) <= 2


def test_agreement_by_hand():
    mismatch = Mismatch.of(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.9]))
    assert mismatch.max_difference == pytest.approx(0.5)
    assert mismatch.mean_difference == pytest.approx(0.2)
    # k3 with x = trainer / sampler: 0, e^0.5 - 1.5, e^-0.1 - 0.9.
    assert mismatch.kl == pytest.approx((0.1487212707 + 0.0048374180) / 3)


@pytest.mark.parametrize("off", [float("nan"), 0.011])
def test_a_difference_above_the_limit_is_refused(off: float):
    with pytest.raises(DeliveryError, match="do not run the same policy"):
        Mismatch(0.0, off, off).check(torch.float32, 1)
    Mismatch(0.0, LIMITS[torch.float32], 5.0).check(torch.float32, 1)


@pytest.mark.parametrize("count", [7, 14, 64])
def test_in_time_every_completion_of_a_batch_is_probed(count: int):
    places = [probed(3, step, count) for step in range(1, 40 * count)]
    assert set(places) == set(range(count))
    assert places != [probed(4, step, count) for step in range(1, 40 * count)]


@pytest.mark.parametrize(
    ("dtype", "correction", "mode", "said"),
    [
        (torch.float32, {}, None, []),
        (
            torch.float32,
            {"high": 5},
            None,
            ["low and high of sampler_correction cannot act: weights are float32"],
        ),
        (torch.float64, {"level": "sequence"}, None, ["cannot act: weights are float64"]),
        (torch.float32, {"high": 5, "mode": "truncate"}, "truncate", []),
        (torch.bfloat16, {"high": 5}, "truncate", ["weights are bfloat16.*at most 5"]),
        (torch.bfloat16, {"mode": "none"}, "none", []),
    ],
)
def test_a_correction_that_is_left_open_is_decided_by_the_precision_and_what_then_cannot_act_is_said(
    dtype: torch.dtype, correction: dict, mode: str | None, said: list[str]
):
    heard: list[str] = []
    found = learner.corrected(GRPOConfig(sampler_correction=correction), dtype, heard.append)
    assert found.sampler_correction.mode == mode
    assert len(heard) == len(said) and all(map(re.search, said, heard)), heard
