"""Checkpoints: the adapter that can be served, and the training state from which a run goes on to the same numbers.

Both are files under paths of this attempt; they count from the moment their CheckpointReport was answered, so a half
written one is never read. The state is safetensors and JSON. It holds no random numbers and no place in the data:
those are functions of seed and step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rewardsmith.errors import JobError
from rewardsmith.rollout.adapter import Fingerprint, adapter_tensors
from rewardsmith.train import lora
from rewardsmith.train.artifacts import JobArtifacts

STATES_KEPT = 2
TENSORS_FILE, PROGRESS_FILE = "state.safetensors", "progress.json"


@dataclass
class Progress:
    """What a run knows of itself after `step` steps, besides its weights.

    `plateau` is the held-out reward that the next evaluations have to beat, `stale` how many in a row did not.
    `lowest` and `highest` are totals seen. All of these are of `revision`: totals of two sets of reward functions
    are on two scales, so `use_revision` begins anew.
    """

    step: int = 0
    last_checkpoint: int | None = None
    saved_step: int | None = None
    best_checkpoint: int | None = None
    best_reward: float | None = None
    plateau: float | None = None
    stale: int = 0
    lowest: float | None = None
    highest: float | None = None
    revision: int | None = None

    def use_revision(self, number: int) -> None:
        """Forgets what was compared by another revision; the first evaluation under the new one sets the measure."""
        if number != self.revision:
            self.best_checkpoint = self.best_reward = self.plateau = self.lowest = self.highest = None
            self.stale, self.revision = 0, number

    def with_checkpoint(self, number: int, reward: float | None) -> Progress:
        """Progress as it is once the present step is saved as `number`; `reward` is its held-out one, if known."""
        saved = replace(self, last_checkpoint=number, saved_step=self.step)
        if reward is not None and (self.best_reward is None or reward > self.best_reward):
            saved.best_reward, saved.best_checkpoint = reward, number
        return saved

    @property
    def served(self) -> int | None:
        """The checkpoint that the version serves if the run ends now: the best, else the newest."""
        return self.best_checkpoint if self.best_checkpoint is not None else self.last_checkpoint


@dataclass(frozen=True)
class Saved:
    path: str
    state_path: str
    fingerprint: str


def number_at(step: int, save_every: int) -> int:
    """The number of a checkpoint saved at `step`: 1 for the first `save_every` steps, and so on."""
    return -(-step // save_every)


def publish(
    artifacts: JobArtifacts, model: PeftModel, optimizer: torch.optim.Optimizer, progress: Progress, number: int
) -> Saved:
    """Writes adapter and state. Raises JobError."""
    path = artifacts.path("checkpoints", f"{number:05d}-step-{progress.step}")
    state_path = artifacts.path("states", f"{number:05d}-step-{progress.step}")
    for name, content in lora.files(model).items():
        artifacts.put(f"{path}/{name}", content)
    policy = adapter_tensors(model, lora.POLICY)
    tensors = {f"policy/{name}": tensor for name, tensor in policy.items()} | _optimizer_tensors(optimizer)
    artifacts.put(f"{state_path}/{TENSORS_FILE}", save({n: t.cpu().contiguous() for n, t in tensors.items()}))
    artifacts.put(f"{state_path}/{PROGRESS_FILE}", json.dumps(asdict(progress)).encode())
    return Saved(path, state_path, Fingerprint.of(policy).digest)


def restore(artifacts: JobArtifacts, state_path: str, model: PeftModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Sets policy and optimizer to a saved state. Raises JobError."""
    try:
        tensors = load(artifacts.get(f"{state_path}/{TENSORS_FILE}"))
        progress = Progress(**json.loads(artifacts.get(f"{state_path}/{PROGRESS_FILE}")))
    except (SafetensorError, ValueError, TypeError) as error:
        raise JobError(f"the training state {state_path} is damaged: {error}") from error
    policy = {name.removeprefix("policy/"): t for name, t in tensors.items() if name.startswith("policy/")}
    lora.load(model, policy, f"the training state {state_path}")
    _set_optimizer(optimizer, tensors)
    return progress


def delete_old_states(artifacts: JobArtifacts) -> None:
    """Keeps the newest training states. Only for a moment when the server has answered the newest checkpoint."""
    folders = sorted({path.rpartition("/")[0] for path in artifacts.list("states")}, key=_age)
    for path in artifacts.list("states"):
        if path.rpartition("/")[0] not in folders[-STATES_KEPT:]:
            artifacts.delete(path)


def _age(folder: str) -> tuple[int, ...]:
    """(fence, checkpoint, step): an attempt's states are newer than all of the attempts before."""
    number, _, step, fence = folder.rpartition("/")[2].split("-")
    return int(fence), int(number), int(step)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"optimizer/{index}/{name}": tensor for index, values in state.items() for name, tensor in values.items()}


def _set_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
