"""Several ranks compute what one computes; a rank that dies ends the job, and no rank outlives the job."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import fused_models
import psutil
import pytest
import torch
from job_runs import config
from processes import wait_until
from tiny_models import random_model, tokenizer
from torch.overrides import TorchFunctionMode

from rewardsmith import machine
from rewardsmith.config import GRPOConfig, SamplingParamsConfig
from rewardsmith.errors import JobCanceled, JobError
from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.rollout.fast import blocked
from rewardsmith.rollout.fast.decode import Decoder
from rewardsmith.train.batch import Example
from rewardsmith.train.fast import memory
from rewardsmith.train.learner import Learner
from rewardsmith.train.lora import POLICY, named_parameters
from rewardsmith.train.losses import LossSettings
from rewardsmith.train.parallel import rank as rank_module
from rewardsmith.train.parallel.rank import Rank, Sampling, new_rows, sharing_memory
from rewardsmith.train.parallel.ranks import Ranks
from rewardsmith.train.parallel.worker import _how_it_ended

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


def made_with(
    ranks: Ranks, job: GRPOConfig, dtype: torch.dtype = torch.float64, device: str = "cpu", **settings
) -> Learner:
    made = Learner(random_model("qwen2").to(device, dtype), tokenizer(), job, ranks=ranks, **settings)
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


def test_a_rank_that_dies_meanwhile_hides_no_cancel_and_keeps_none_from_the_others():
    tokens = 0

    def between() -> None:
        nonlocal tokens
        tokens += 1
        if tokens == 4:
            first = ranks._workers[0]._process
            first.kill()
            first.join()
            raise JobCanceled("canceled by the user")

    with Ranks(2) as ranks:
        made = made_with(ranks, config(), between_tokens=between)
        with pytest.raises(JobCanceled):
            drawn(made)
        assert not any(worker.busy or worker.groups for worker in ranks._workers)
        with pytest.raises(JobError, match=r"training rank 1 is gone \(it was killed"):
            drawn(made)


def test_closing_the_completions_early_leaves_the_ranks_usable():
    with learner(1) as made:
        groups = made.engine.generate(PROMPTS, COUNT, PARAMS, SEEDS)
        next(groups)
        groups.close()
        assert [len(group) for group in drawn(made)] == [COUNT] * len(PROMPTS)


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "it was killed, often for want of memory"), (signal.SIGUSR1, "it was ended by SIGUSR1")],
)
def test_a_rank_that_is_killed_is_an_error_that_says_so(number: signal.Signals, words: str):
    with learner(1) as made:
        os.kill(made.engine._workers[0]._process.pid, number)
        with pytest.raises(JobError, match=rf"training rank 1 is gone \({words}\). The job cannot go on"):
            drawn(made)


def test_what_is_said_of_a_rank_that_is_gone_is_true():
    assert _how_it_ended(None) == "its process runs but does not answer"
    assert _how_it_ended(3) == "exit status 3"
    assert _how_it_ended(-signal.SIGSEGV) == "it was ended by SIGSEGV"
    assert "--shm-size" in _how_it_ended(-signal.SIGBUS)


def test_what_a_rank_has_to_say_reaches_the_user(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    heard: list[str] = []
    with learner(1, notice=heard.append) as made:
        gradients(made, batch(drawn(made)))
    assert len(heard) == 2 and all("each layer is computed twice" in said for said in heard)
    assert sum(said.startswith("rank 1: ") for said in heard) == 1


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


# ---- the reference, memory, cores


def test_the_reference_is_computed_by_all_ranks():
    with learner(0) as alone:
        examples = batch(drawn(alone))
        expected = alone.reference_logps(examples)
        by_peft = alone.plain.reference_logps(examples, alone.config)
    with learner(1) as together:
        found = together.reference_logps(examples)
        together.engine._workers[0]._process.kill()
        with pytest.raises(JobError, match="training rank 1 is gone"):
            together.reference_logps(examples)
    assert len(found) == len(examples)
    for ours, one, plain in zip(found, expected, by_peft, strict=True):
        torch.testing.assert_close(ours, one, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def rank_of(weights, number: int = 0, count: int = 1, device: str | None = None) -> Rank:
    sampling = Sampling([1], fused_models.VOCAB)
    return Rank(number, count, weights, device, new_rows(weights, 1)[0], sampling, between_tokens=lambda: None)


def test_what_the_reference_pass_learns_of_memory_holds_for_the_update(monkeypatch: pytest.MonkeyPatch):
    _, weights = fused_models.policy()
    rank, heard = rank_of(weights), []
    rank.budget.most, rank.budget.notice = 40, heard.append
    split, calls = torch.split, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            torch.empty(2**62, dtype=torch.uint8)
        return split(*arguments, **options)

    monkeypatch.setattr(torch, "split", failing)
    rank.reference_logps(fused_models.batch(), 1.0)
    assert len(heard) == 1 and rank.budget.most == 20


def test_ranks_of_a_cpu_share_its_memory_and_a_gpu_is_one_ranks_own(monkeypatch: pytest.MonkeyPatch):
    assert [sharing_memory(4, device) for device in ("cpu", "cuda")] == [4, 1]
    monkeypatch.setattr(rank_module, "free_bytes", lambda device: 8000)
    _, weights = fused_models.policy()
    for rank in (rank_of(weights, 1, 4), rank_of(weights, 1, 4, device="cpu")):
        assert rank.engine.batch._cache_bytes == 1000
        assert rank.engine._decoder.blocked._most == 500
    room = 4 * 100 * memory.bytes_per_row(weights) / memory.SHARE
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(room))
    assert rank.budget.rows(weights, 3, 10) == 64, "of 100 rows for each, in steps of two"


def test_a_rank_on_a_gpu_makes_it_the_current_one_before_anything_lies_there(monkeypatch: pytest.MonkeyPatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    _, weights = fused_models.policy()
    with pytest.raises((AssertionError, RuntimeError)):  # there is no such card
        rank_of(weights, 1, 2, "cuda:99")
    assert chosen == [torch.device("cuda:99")]


class Fetched(TorchFunctionMode):
    """Notes what `Tensor.cpu` returns while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.Tensor.cpu:
            self.tensors.append(result)
        return result


def test_log_probs_leave_a_rank_in_the_cpus_memory():
    """Those of two GPUs could neither be sent nor be put together."""
    _, weights = fused_models.policy()
    rank, examples = rank_of(weights), fused_models.batch()
    with Fetched() as fetched:
        own = rank.gradient(examples, LossSettings(), 1.0, None).logps
        reference = rank.reference_logps(examples, 1.0)
    assert len(own) == len(reference) == len(examples)
    assert all(any(logps is tensor for tensor in fetched.tensors) for logps in [*own, *reference])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_ranks_on_a_gpu_train_as_one():
    """Each with weights of its own, as on two cards; one is enough for what travels between them."""
    losses = []
    for devices in (["cuda:0"], ["cuda:0", "cuda:0"]):
        with Ranks(devices=devices) as ranks:
            made = made_with(ranks, config(updates_per_batch=2, beta=0.1), torch.float32, "cuda:0")
            result, _ = made.update(batch(drawn(made)), 1, 10)
            made.deliver(version=2)
            made.reference_logps(batch(drawn(made)))
        losses.append(result.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.skipif(not blocked.HAS_ONEDNN, reason="this build of torch has no oneDNN")
def test_blocked_copies_are_of_the_delivered_adapter_in_every_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocked, "LEAST_BYTES", 0)
    monkeypatch.setattr(blocked, "FEWEST_ROWS", 1)
    # As if a batch went on over each delivery: nothing else drops the copies then.
    monkeypatch.setattr(Decoder, "clear", lambda self: self.cache.clear())
    with learner(1, torch.float32) as made:
        for version in (2, 3):
            for tensor in adapter_tensors(made.model, POLICY).values():
                tensor.mul_(-1.5)
            made.deliver(version)
            examples = batch(drawn(made))
            assert made.engine._own.engine._decoder.blocked._copies
            plain = made.plain.policy_logps(examples, made.config)
            for example, logps in zip(examples, plain, strict=True):
                assert example.sampler_logps == pytest.approx(logps.tolist(), abs=1e-4)


def test_no_more_ranks_than_a_quota_pays_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Ranks.of_this_machine() as ranks:
        assert ranks.count == 3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_process_alone_takes_as_many_threads_as_the_user_asked_for(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "PROC", tmp_path)  # no quota, whatever this machine has
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    try:
        made = made_with(Ranks(), config(lora_dropout=dropout))
        assert made.path.startswith("plain" if dropout else "fast, 1 rank(s) of 2 thread(s)")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
