"""Several ranks compute what one computes; a rank that dies ends the job, and no rank outlives the job."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest
import torch
from job_runs import config
from processes import wait_until
from tiny_models import random_model, tokenizer

from rewardsmith.config import GRPOConfig, SamplingParamsConfig
from rewardsmith.errors import JobCanceled, JobError
from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.train.batch import Example
from rewardsmith.train.learner import Learner
from rewardsmith.train.lora import POLICY, named_parameters
from rewardsmith.train.parallel.ranks import Ranks

PROMPTS = [[5, 6, 7], [9], [12, 3, 3, 8, 20], [5, 6, 7]]
COUNT = 5
PARAMS = SamplingParamsConfig(max_tokens=14)
SEEDS = list(range(100, 100 + len(PROMPTS) * COUNT))


@contextmanager
def learner(workers: int, dtype: torch.dtype = torch.float64, job: GRPOConfig | None = None, **settings):
    with Ranks(workers) as ranks:
        made = made_with(ranks, job or config(), dtype, **settings)
        assert made.path.startswith(f"fast, {workers + 1} rank(s) of 1 thread") or not workers
        yield made


def made_with(ranks: Ranks, job: GRPOConfig, dtype: torch.dtype = torch.float64, **settings) -> Learner:
    made = Learner(random_model("qwen2").to(dtype), tokenizer(), job, ranks=ranks, **settings)
    generator = torch.Generator().manual_seed(2)
    for tensor in adapter_tensors(made.model, POLICY).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    made.deliver(version=1)
    return made


def drawn(made: Learner) -> list[list]:
    groups = dict(made.engine.generate(PROMPTS, COUNT, PARAMS, SEEDS))
    return [groups[i] for i in range(len(PROMPTS))]


def batch(groups: list[list]) -> list[Example]:
    return [
        Example(prompt, completion.ids, advantage=(n - 2) / 3, weight=0.02, sampler_logps=completion.logps)
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for n, completion in enumerate(group)
    ]


def gradients(made: Learner, examples: list[Example]) -> dict[str, torch.Tensor]:
    made.optimizer.zero_grad(set_to_none=False)
    made.gradients.gradient(examples, made.config, None)
    return {name: parameter.grad.clone() for name, parameter in named_parameters(made.model).items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_completions_and_gradients_do_not_depend_on_the_number_of_ranks(workers: int):
    job = config(beta=0.1)
    with learner(0, job=job) as alone:
        expected, wanted = drawn(alone), gradients(alone, batch(drawn(alone)))
    with learner(workers, job=job) as together:
        found, had = drawn(together), gradients(together, batch(expected))
    for group, other in zip(expected, found, strict=True):
        for one, two in zip(group, other, strict=True):
            assert (one.ids, one.text, one.finish_reason) == (two.ids, two.text, two.finish_reason)
            assert one.logps == pytest.approx(two.logps, abs=1e-9)
    assert any(tensor.abs().max() > 1e-4 for tensor in wanted.values())
    for name, tensor in wanted.items():
        torch.testing.assert_close(had[name], tensor, rtol=1e-9, atol=1e-12)


def test_a_whole_update_does_not_depend_on_the_number_of_ranks():
    after = []
    for workers in (0, 1):
        with learner(workers, job=config(updates_per_batch=2, learning_rate=1e-3)) as made:
            result, _ = made.update(batch(drawn(made)), 1, 10)
            made.deliver(version=2)
            after.append((result, [p.detach().clone() for p in named_parameters(made.model).values()], drawn(made)))
    (one, weights, texts), (two, others, other_texts) = after
    assert one.loss == pytest.approx(two.loss, rel=1e-9) and one.grad_norm == pytest.approx(two.grad_norm, rel=1e-9)
    for tensor, other in zip(weights, others, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-9)
    assert [[c.ids for c in group] for group in texts] == [[c.ids for c in group] for group in other_texts]


def test_every_completion_sees_a_delivery_at_once():
    with learner(1) as made:
        before = drawn(made)
        for tensor in adapter_tensors(made.model, POLICY).values():
            tensor.mul_(3)
        made.deliver(version=2)
        after = drawn(made)
    for group, other in zip(before, after, strict=True):
        assert all(one.logps[0] != two.logps[0] for one, two in zip(group, other, strict=True))


def test_a_job_that_is_canceled_stops_all_ranks_and_can_go_on():
    tokens = 0

    def between() -> None:
        nonlocal tokens
        tokens += 1
        if tokens == 4:
            raise JobCanceled("canceled by the user")

    with learner(1, between_tokens=between) as made:
        with pytest.raises(JobCanceled):
            drawn(made)
        assert [len(group) for group in drawn(made)] == [COUNT] * len(PROMPTS)


def test_closing_the_completions_early_leaves_the_ranks_usable():
    with learner(1) as made:
        groups = made.engine.generate(PROMPTS, COUNT, PARAMS, SEEDS)
        next(groups)
        groups.close()
        assert [len(group) for group in drawn(made)] == [COUNT] * len(PROMPTS)


def test_a_rank_that_is_killed_is_an_error_that_says_so():
    with learner(1) as made:
        made.engine._workers[0]._process.kill()
        with pytest.raises(JobError, match=r"training rank 1 is gone \(it was killed, often for want of memory\)"):
            drawn(made)


def test_what_fails_in_a_rank_reaches_the_job():
    with learner(1) as made:
        whole = [Example([1], [2], 1.0, 1.0, [0.0])] * 20
        broken = [Example([2], [10**6], 1.0, 1.0, [0.0])] * 20  # no such token
        with pytest.raises(JobError, match="a training rank failed: index 1000000 is out of bounds"):
            gradients(made, whole + broken)


ORPHAN = """
import sys, time
from rewardsmith.train.parallel.ranks import Ranks
with Ranks(2) as ranks:
    print(*[worker._process.pid for worker in ranks._workers], flush=True)
    time.sleep(60)
"""


def test_ranks_end_with_the_process_they_belong_to():
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(alive(worker) for worker in workers), "the workers end")


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ranks_with_weights_of_their_own_compute_the_same():
    """What several GPUs do, on a CPU: weights are copied, adapters travel, gradients come back."""
    job = config(beta=0.1)
    with learner(0, job=job) as alone:
        expected = drawn(alone)
        wanted = gradients(alone, batch(expected))
    with Ranks(devices=["cpu", "cpu"]) as ranks:
        together = made_with(ranks, job)
        found = drawn(together)
        had = gradients(together, batch(expected))
        for tensor in adapter_tensors(together.model, POLICY).values():
            tensor.mul_(3)
        together.deliver(version=2)
        after = drawn(together)
    assert [[c.ids for c in group] for group in found] == [[c.ids for c in group] for group in expected]
    for name, tensor in wanted.items():
        torch.testing.assert_close(had[name], tensor, rtol=1e-9, atol=1e-12)
    for group, other in zip(found, after, strict=True):
        assert all(one.logps[0] != two.logps[0] for one, two in zip(group, other, strict=True))


def test_supports_of_cut_draws_come_back_from_all_ranks():
    cut = SamplingParamsConfig(max_tokens=14, top_k=3)
    with learner(0) as alone, learner(1) as together:
        expected = dict(alone.engine.generate(PROMPTS, COUNT, cut, SEEDS))
        found = dict(together.engine.generate(PROMPTS, COUNT, cut, SEEDS))
        open_files = psutil.Process().num_fds()
        for _ in range(3):
            dict(together.engine.generate(PROMPTS, COUNT, cut, SEEDS))
        assert psutil.Process().num_fds() == open_files
    for place, group in expected.items():
        for one, two in zip(group, found[place], strict=True):
            assert one.ids == two.ids
            assert torch.equal(one.support.ids, two.support.ids)
            assert torch.equal(one.support.offsets, two.support.offsets)
