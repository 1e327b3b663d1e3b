from pathlib import Path

import pytest
import torch
from job_runs import config, spec
from peft import PeftModel
from tiny_models import random_model

from rewardsmith.errors import JobError
from rewardsmith.rollout.adapter import Fingerprint, adapter_tensors
from rewardsmith.train import checkpoint, lora
from rewardsmith.train.artifacts import JobArtifacts
from rewardsmith.train.checkpoint import Progress
from rewardsmith.train.update import make_optimizer


def trainee(seed: int = 0) -> tuple[PeftModel, torch.optim.Optimizer]:
    model = lora.attach(random_model("qwen2"), config(seed=seed), "b")
    return model, make_optimizer(model, config().optimizer, 1e-2)


def learn(model: PeftModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters(model):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def policy(model: PeftModel) -> Fingerprint:
    return Fingerprint.of(adapter_tensors(model, lora.POLICY))


def artifacts(folder: Path, fence: int = 1) -> JobArtifacts:
    return JobArtifacts(spec(folder, folder, config(), fence=fence))


def test_a_restored_run_takes_the_same_steps_bit_for_bit(tmp_path: Path):
    model, optimizer = trainee()
    learn(model, optimizer, 1)
    learn(model, optimizer, 2)
    progress = Progress(step=2, last_checkpoint=1, best_reward=0.25, plateau=0.2, stale=3, lowest=-1.0)
    saved = checkpoint.publish(artifacts(tmp_path), model, optimizer, progress, number=1)
    assert saved.fingerprint == policy(model).digest
    learn(model, optimizer, 3)

    other, its_optimizer = trainee(seed=8)
    restored = checkpoint.restore(artifacts(tmp_path, fence=2), saved.state_path, other, its_optimizer)
    assert restored == progress
    learn(other, its_optimizer, 3)
    assert policy(other) == policy(model)


def test_a_published_checkpoint_is_a_peft_folder_of_this_attempt(tmp_path: Path):
    model, optimizer = trainee()
    first = checkpoint.publish(artifacts(tmp_path), model, optimizer, Progress(step=5), number=1)
    learn(model, optimizer, 1)
    second = checkpoint.publish(artifacts(tmp_path, fence=2), model, optimizer, Progress(step=5), number=1)
    assert first.path != second.path and first.state_path != second.state_path
    assert sorted(p.name for p in (tmp_path / first.path).iterdir()) == [lora.CONFIG_FILE, lora.WEIGHTS_FILE]
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.p*t"))


def test_a_damaged_state_is_an_error_not_a_guess(tmp_path: Path):
    model, optimizer = trainee()
    learn(model, optimizer, 1)
    saved = checkpoint.publish(artifacts(tmp_path), model, optimizer, Progress(step=1), number=1)
    tensors = tmp_path / saved.state_path / checkpoint.TENSORS_FILE
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(JobError, match="damaged"):
        checkpoint.restore(artifacts(tmp_path), saved.state_path, *trainee())
    tensors.unlink()
    with pytest.raises(JobError, match="cannot be read"):
        checkpoint.restore(artifacts(tmp_path), saved.state_path, *trainee())


def test_the_newest_states_are_kept_and_all_adapters(tmp_path: Path):
    model, optimizer = trainee()
    for fence, number in ((1, 9), (1, 10), (1, 11), (2, 10)):
        checkpoint.publish(artifacts(tmp_path, fence), model, optimizer, Progress(step=20 * number), number)
    checkpoint.delete_old_states(artifacts(tmp_path, fence=2))
    left = sorted(path.rpartition("/")[0].rpartition("/")[2] for path in artifacts(tmp_path).list("states"))
    assert sorted(set(left)) == ["00010-step-200-2", "00011-step-220-1"]
    assert len(artifacts(tmp_path).list("checkpoints")) == 2 * 4


def test_numbers_are_a_function_of_the_step():
    assert [checkpoint.number_at(step, 20) for step in (1, 20, 21, 40, 47)] == [1, 1, 2, 2, 3]
