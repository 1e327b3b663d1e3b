"""The budget of a micro-batch: what memory allows, what happens when it runs out, and what a step really takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_models import TEMPERATURE, VOCAB, batch, fast_gradient, policy, relative_difference

from rewardsmith.errors import ModelError
from rewardsmith.rollout.model.weights import Weights
from rewardsmith.train.fast import gradient as fast
from rewardsmith.train.fast import memory
from rewardsmith.train.fast.memory import Budget, bytes_per_row, out_of_memory
from rewardsmith.train.losses import LossSettings

TESTS = Path(__file__).parents[1]


def rows(monkeypatch: pytest.MonkeyPatch, weights: Weights, free: float, prompt: int = 3, ranks: int = 1) -> int:
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free))
    return Budget(ranks).rows(weights, prompt, prompt + 10)


def test_ample_memory_gives_a_constant_and_little_a_half_or_a_quarter(monkeypatch: pytest.MonkeyPatch):
    _, weights = policy()
    plenty = bytes_per_row(weights) * memory.ROWS["cpu"] / memory.SHARE + 1
    assert rows(monkeypatch, weights, 100 * plenty) == rows(monkeypatch, weights, plenty) == memory.ROWS["cpu"] == 2048
    assert rows(monkeypatch, weights, 0.9 * plenty) == rows(monkeypatch, weights, 0.6 * plenty) == 1024
    assert rows(monkeypatch, weights, plenty, ranks=4) == 512
    assert rows(monkeypatch, weights, plenty / 1000) == memory.FEWEST_ROWS == 64


def test_no_more_memory_is_taken_than_makes_it_faster(monkeypatch: pytest.MonkeyPatch):
    _, weights = policy()
    for kept, expected in ((1500, 1024), (1000, 512), (10, memory.ENOUGH_ROWS)):
        monkeypatch.setattr(memory, "KEPT_BYTES", kept * bytes_per_row(weights))
        assert rows(monkeypatch, weights, 1e12) == expected
    # With long prompts it is: a prompt is computed again in every micro-batch of its group.
    assert rows(monkeypatch, weights, 1e12, prompt=1000) == 8000


def test_a_completion_too_long_for_the_free_memory_is_recomputed_from_the_start(monkeypatch: pytest.MonkeyPatch):
    _, weights = policy()
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(100 * bytes_per_row(weights) / memory.SHARE))
    budget, heard = Budget(), []
    budget.notice = heard.append
    budget.rows(weights, 10, 99)
    assert not budget.recompute and not heard
    budget.rows(weights, 10, 101)
    assert budget.recompute and "101 tokens" in heard[0]
    assert bytes_per_row(weights, recompute=True) < bytes_per_row(weights)


def test_memory_that_runs_out_halves_then_recomputes_then_ends_the_job():
    _, weights = policy()
    budget, heard = Budget(), []
    budget.notice = heard.append
    assert budget.rows(weights, 100, 600) == 2048
    for expected in ((1024, False), (512, False), (512, True)):
        budget.shrink(longest=600)
        assert (budget.rows(weights, 100, 600), budget.recompute) == expected
    with pytest.raises(ModelError, match="one completion of 600 tokens"):
        budget.shrink(longest=600)
    assert len(heard) == 3 and "1024" in heard[0] and "twice" in heard[2]


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as asked:
        torch.empty(2**62, dtype=torch.uint8)
    assert out_of_memory(asked.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not out_of_memory(other.value)


def test_an_attempt_that_fails_leaves_nothing_in_the_gradient(monkeypatch: pytest.MonkeyPatch):
    """The third micro-batch runs out of memory, once: everything is computed again, with half as much at a time."""
    _, weights = policy()
    settings = LossSettings(beta=0.1)
    _, expected = fast_gradient(weights, batch(), settings)
    budget, heard = Budget(), []
    budget.most, budget.notice = 40, heard.append
    calls = []
    whole_pack = torch.autograd.backward

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            torch.empty(2**62, dtype=torch.uint8)
        whole_pack(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "backward", failing)
    _, gradients = fast_gradient(weights, batch(), settings, budget=budget)
    assert relative_difference(gradients, expected) < 1e-12
    assert len(heard) == 1 and budget.most == 20


def test_log_probs_that_run_out_of_memory_are_computed_again_with_less(monkeypatch: pytest.MonkeyPatch):
    _, weights = policy()
    expected = fast.logps(weights, batch(), TEMPERATURE, VOCAB, budget=Budget(), base=True)
    budget, heard = Budget(), []
    budget.most, budget.notice = 40, heard.append
    calls = []
    split = torch.split

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            torch.empty(2**62, dtype=torch.uint8)
        return split(*arguments, **options)

    monkeypatch.setattr(torch, "split", failing)
    found = fast.logps(weights, batch(), TEMPERATURE, VOCAB, budget=budget, base=True)
    assert len(found) == len(expected)
    assert all(torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in zip(found, expected, strict=True))
    assert len(heard) == 1 and budget.most == 20


# Runs in a process of its own: {rows, groups, spare: MiB it may take over what it has, or 0 for no limit}.
STEP = """
import json, resource, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/train"]
import torch
from fused_models import batch, fast_gradient, policy
from rewardsmith.train.losses import LossSettings
from rewardsmith.train.fast.memory import Budget
import tiny_models
tiny_models.ODDITIES["qwen2"] |= dict(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=4, max_position_embeddings=4096
)
_, weights = policy("qwen2", torch.float32)
examples = batch([([1 + i] * 60, ({length},) * 3) for i in range({groups})])
budget, heard = Budget(), []
budget.most, budget.notice = {rows}, heard.append
fast_gradient(weights, batch(), LossSettings(), budget=budget)  # threads, libraries, buffers
def size(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = size("VmRSS")
if {spare}:
    limit = size("VmSize") + {spare} * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
error = ""
try:
    _, gradients = fast_gradient(weights, examples, LossSettings(), budget=budget)
except Exception as failure:
    error, gradients = type(failure).__name__, {{}}
print(json.dumps(dict(
    peak=size("VmHWM") - before, heard=heard, error=error, recompute=budget.recompute, rows=budget.most,
    norm=float(sum(tensor.double().square().sum() for tensor in gradients.values()) ** 0.5),
)))
"""


def step(rows: int, groups: int, spare: int = 0, length: int = 129) -> dict:
    code = STEP.format(tests=str(TESTS), rows=rows, groups=groups, spare=spare, length=length)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_peak_memory_grows_with_the_budget_and_not_with_the_batch():
    small, more, large = step(256, 1), step(256, 3), step(2048, 3)
    assert more["peak"] < 1.25 * small["peak"] + 2**21
    assert large["peak"] > 2 * small["peak"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_step_that_runs_out_of_memory_goes_on_with_less():
    free, tight = step(2048, 2), step(2048, 2, spare=60)
    assert tight["heard"] and tight["error"] == "" and tight["rows"] < 2048
    assert tight["norm"] == pytest.approx(free["norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_step_without_any_memory_says_so():
    nothing = step(2048, 1, spare=1, length=1000)
    assert nothing["error"] == "ModelError" and nothing["recompute"]
