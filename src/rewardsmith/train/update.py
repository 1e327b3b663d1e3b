"""The optimizer's part of a step: gradients of the loss over a whole batch, clipped, and AdamW at the step's rate.

A batch is learned from `updates_per_batch` times. In the first update the policy that learns is the policy that
sampled, so its own log-probs, detached, are the old ones and no pass is spent on them; further updates take those of
the first.
How a gradient comes about is the business of a `GradientPath`: `plain` by the transformers model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

import torch
from peft import PeftModel
from torch import Tensor

from rewardsmith.config import GRPOConfig, OptimizerConfig, SchedulerConfig
from rewardsmith.errors import ModelError
from rewardsmith.rollout.sampling import completion_seed
from rewardsmith.train.batch import Example, Gradient
from rewardsmith.train.lora import parameters


class GradientPath(Protocol):
    def gradient(
        self, examples: Sequence[Example], config: GRPOConfig, old_logps: list[Tensor | None] | None
    ) -> Gradient:
        """Adds the gradient of the whole batch's loss to `.grad` of the policy's parameters.

        `old_logps` are the `logps` of the first update on this batch, None in that update.
        """

    def reference_logps(self, examples: Sequence[Example], config: GRPOConfig) -> list[Tensor]:
        """Log-probs of each completion's tokens with the adapter off, in the order of `examples`."""


@dataclass(frozen=True)
class Update:
    """One step; with several updates on its batch the numbers are their means.

    `kl` to the reference is per trained token in nats, None without a reference pass. `clipped_low` and `clipped_high`
    are shares of the trained tokens. `logps` are the policy's before the step, as in `Gradient`.
    """

    loss: float
    kl: float | None
    grad_norm: float
    learning_rate: float
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    logps: list[Tensor | None] = field(default_factory=list)


def update(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    config: GRPOConfig,
    path: GradientPath,
    *,
    step: int,
    total_steps: int,
    between_updates: Callable[[], None] = lambda: None,
) -> Update:
    """Learns from `examples`, the whole batch of `step` (from 1). `between_updates` is called before each further
    update, for a path that keeps weights of its own.

    Raises ModelError for a gradient that is not a number.
    """
    learning_rate = config.learning_rate * rate_factor(config.lr_scheduler, config.warmup_ratio, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    gradients: list[Gradient] = []
    norms: list[float] = []
    for number in range(config.updates_per_batch):
        if number:
            between_updates()
        # The same masks in every update of a step: the ratio is of one thinned network to itself.
        torch.manual_seed(completion_seed(config.seed, "dropout", step))
        optimizer.zero_grad(set_to_none=False)
        gradients.append(path.gradient(examples, config, gradients[0].logps if gradients else None))
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters(model), config.max_grad_norm)))
        if not math.isfinite(norms[-1]):
            raise ModelError(f"the gradient of step {step} is not a number; a lower learning_rate often helps")
        # Also without any signal: AdamW goes on by its momentum, as it would for a gradient that happens to be zero.
        optimizer.step()
    # Which tokens have a gradient is the same in every update, so these are means over updates and tokens.
    whole = Gradient.total(gradients)
    tokens = max(whole.tokens, 1)
    return Update(
        loss=whole.loss / len(gradients),
        kl=None if whole.kl is None else whole.kl / tokens,
        grad_norm=fmean(norms),
        learning_rate=learning_rate,
        clipped_low=whole.clipped_low / tokens,
        clipped_high=whole.clipped_high / tokens,
        logps=gradients[0].logps,
    )


def make_optimizer(model: PeftModel, config: OptimizerConfig, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with 32-bit states, whatever the accepted name; `setup` says so where the name promises something else."""
    learned = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert learned == {id(parameter) for parameter in parameters(model)}, "the optimizer has to train all of the policy"
    for parameter in parameters(model):
        # There from the start: AdamW passes over a parameter without a gradient, and a resumed run would differ.
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.AdamW(
        parameters(model),
        lr=learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=config.type == "adamw_torch_fused",
    )


def rate_factor(scheduler: SchedulerConfig, warmup_ratio: float, step: int, total_steps: int) -> float:
    """The share of the learning rate at `step` of 1 to `total_steps`; above 0 at every step.

    A linear rise over the first `warmup_ratio` of the steps, then by type: linear and cosine fall towards 0 at the
    step after the last, with restarts `num_cycles` times. "constant" has no warm-up.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if scheduler.type == "constant":
        return 1.0
    if step <= warmup:
        return step / warmup
    if scheduler.type == "constant_with_warmup":
        return 1.0
    done = (step - warmup - 1) / (total_steps - warmup)
    if scheduler.type == "linear":
        return 1.0 - done
    cycles = scheduler.num_cycles if scheduler.type == "cosine_with_restarts" else 1
    return 0.5 * (1.0 + math.cos(math.pi * (done * cycles % 1.0)))
