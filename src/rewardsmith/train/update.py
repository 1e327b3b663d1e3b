"""One optimizer step: the gradient of the loss over a whole batch, clipped, and AdamW at the step's learning rate.

There is one update per batch, so the policy that learns is the policy that sampled: the ratio in the loss is to its
own log-probs, detached, and no pass is spent on old ones. The reference is the same model with the adapter off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rewardsmith.config import GRPOConfig, OptimizerConfig, SchedulerConfig
from rewardsmith.errors import ModelError
from rewardsmith.rollout.sampling import completion_seed
from rewardsmith.train.batch import Example, micro_batches, token_logps
from rewardsmith.train.grpo import k3, policy_losses
from rewardsmith.train.lora import POLICY, parameters


@dataclass(frozen=True)
class Update:
    """`kl` to the reference is the mean over the trained tokens in nats, None without a reference pass."""

    loss: float
    kl: float | None
    grad_norm: float
    learning_rate: float


def update(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    config: GRPOConfig,
    *,
    vocab: int,
    step: int,
    total_steps: int,
) -> Update:
    """Learns from `examples`, the whole batch of `step` (from 1).

    Raises ModelError for a gradient that is not a number.
    """
    learning_rate = config.learning_rate * rate_factor(config.lr_scheduler, config.warmup_ratio, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    torch.manual_seed(completion_seed(config.seed, "dropout", step))
    optimizer.zero_grad(set_to_none=False)
    loss, kl = add_gradient(model, examples, config, vocab)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters(model), config.max_grad_norm))
    if not math.isfinite(grad_norm):
        raise ModelError(f"the gradient of step {step} is not a number; a lower learning_rate often helps")
    # Also without any signal: AdamW goes on by its momentum, as it would for a gradient that happens to be zero.
    optimizer.step()
    return Update(loss, kl, grad_norm, learning_rate)


def add_gradient(
    model: PeftModel, examples: Sequence[Example], config: GRPOConfig, vocab: int
) -> tuple[float, float | None]:
    """Adds the gradient of the batch's loss to the policy's parameters. Returns loss and KL to the reference."""
    model.set_adapter(POLICY)
    _only_adapter_dropout(model)
    # Without KL a completion of advantage 0 has no gradient at all; its weight is in the others' denominators.
    learned = [example for example in examples if example.weight and (example.advantage or config.beta)]
    temperature = config.sampling_params.temperature
    loss, kl, tokens = 0.0, 0.0, 0
    for batch in micro_batches(learned, vocab, model.device):
        reference_logps_N = None
        if config.beta:
            with torch.no_grad(), model.disable_adapter():
                reference_logps_N = token_logps(model, batch, temperature, vocab)
        logps_N = token_logps(model, batch, temperature, vocab)
        losses_N = policy_losses(
            logps_N, logps_N.detach(), batch.advantages_N.to(logps_N), config.clip_low, config.clip_high
        )
        if reference_logps_N is not None:
            kl_N = k3(logps_N, reference_logps_N)
            losses_N = losses_N + config.beta * kl_N
            kl += float(kl_N.detach().sum())
        part: Tensor = (losses_N * batch.weights_N.to(logps_N)).sum()
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
        tokens += len(logps_N)
    return loss, kl / max(tokens, 1) if config.beta else None


@torch.no_grad()
def policy_logps(model: PeftModel, examples: Sequence[Example], config: GRPOConfig, vocab: int) -> list[Tensor]:
    """Log-probs of each completion's tokens under the policy, without dropout, in the order of `examples`."""
    model.set_adapter(POLICY)
    model.eval()
    one_by_one = [next(micro_batches([example], vocab, model.device)) for example in examples]
    return [token_logps(model, batch, config.sampling_params.temperature, vocab) for batch in one_by_one]


def _only_adapter_dropout(model: PeftModel) -> None:
    """The base model's own dropout stays off: it would make the policy another one than the engine sampled with."""
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer) and POLICY in module.lora_dropout:
            module.lora_dropout[POLICY].train()


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
