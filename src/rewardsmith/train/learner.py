"""The policy in training and the engine that samples from it: all that a step needs of the model.

There are two paths that compute the same. The fast one runs on all ranks with fused weights (`ranks`); the plain one is
the transformers model with PEFT's adapter, slow, obvious, and the measure for the other. A model that the fast path
does not know exactly takes the plain one, and `path` says so. Which rows are drawn, how they are scored and what is
reported is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rewardsmith import machine
from rewardsmith.config import GRPOConfig
from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.rollout.engine import Engine, context_of, stop_ids
from rewardsmith.rollout.memory import free_bytes
from rewardsmith.rollout.model.architecture import Architecture, Unsupported, describe
from rewardsmith.rollout.model.weights import Weights
from rewardsmith.rollout.plain import PlainEngine
from rewardsmith.train import agreement, lora
from rewardsmith.train.agreement import Mismatch
from rewardsmith.train.batch import Example, Gradient
from rewardsmith.train.losses import LossSettings, has_bounds
from rewardsmith.train.parallel.rank import Sampling
from rewardsmith.train.parallel.ranks import Ranks
from rewardsmith.train.plain import PlainPath
from rewardsmith.train.update import GradientPath, Update, make_optimizer, update

MERGED_SHARE = 0.5  # of the free memory that a merged copy of the weights may take


class Learner:
    """`base` gets an adapter of its own; `ranks` are started by the caller, early, and closed by it.

    `longest_prompt` is in tokens. `notice` hears what a user should know of: a plain path and why, less memory than
    wanted. `path` says what runs, for the user.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GRPOConfig,
        *,
        base_name: str = "",
        longest_prompt: int = 0,
        ranks: Ranks | None = None,
        between_tokens: Callable[[], None] = lambda: None,
        notice: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.config = config = corrected(config, base.dtype, notice)
        self.model = lora.attach(base, config, base_name)
        self.optimizer = make_optimizer(self.model, config.optimizer, config.learning_rate)
        self.vocab = min(len(tokenizer), base.config.get_text_config(decoder=True).vocab_size)
        self.plain = PlainPath(self.model, self.vocab)
        self.engine: Engine
        self.gradients: GradientPath
        self.dtype = base.dtype
        ranks = ranks or Ranks()
        try:
            weights = fused(self.model, config, notice)
            check_context(weights.architecture, longest_prompt + config.sampling_params.max_tokens, self.model)
        except Unsupported as reason:
            ranks.close()
            torch.set_num_threads(machine.threads())
            notice(f"training runs on the plain path, which is several times slower: {reason}")
            lora.add_rollout_adapter(self.model)
            self.engine = PlainEngine(self.model, tokenizer, lora.ROLLOUT, between_tokens=between_tokens)
            self.gradients = self.plain
            self.path = "plain"
        else:
            sampling = Sampling(stop_ids(self.model, tokenizer), self.vocab, tokenizer)
            ranks.load(weights, sampling, between_tokens, notice)
            self.engine = ranks
            self.gradients = FastPath(ranks, self.model)
            self.path = (
                f"fast, {ranks.count} rank(s) of {torch.get_num_threads()} thread(s), kernels {ranks.kernel}, adapter "
                f"{'merged into' if weights.merged else 'applied beside'} {weights.bound_modules} linear layers"
            )

    def deliver(self, version: int) -> None:
        """Gives the policy to the engine. Raises DeliveryError unless the engine then holds it bit for bit."""
        lora.deliver(self.model, self.engine, version)

    def update(self, examples: Sequence[Example], step: int, total_steps: int) -> tuple[Update, Mismatch]:
        """Learns from `examples`, the whole batch of `step` (from 1), once it is sure who sampled it.

        Raises ModelError, and DeliveryError when the engine did not sample with the policy.
        """
        probed = agreement.probe(self.plain, examples, self.config, step)
        probed.check(self.dtype, step)
        result = update(
            self.model,
            self.optimizer,
            examples,
            self.config,
            self.gradients,
            step=step,
            total_steps=total_steps,
            between_updates=lambda: self.deliver(step),
        )
        mismatch = None
        if not self.config.lora_dropout:  # thinned out by dropout, the policy has other log-probs
            mismatch = agreement.of_batch(examples, result.logps)
        mismatch = mismatch or probed
        mismatch.check(self.dtype, step)
        return result, mismatch

    def reference_logps(self, examples: Sequence[Example]) -> list[Tensor]:
        """Of each completion's tokens under the model with its adapter off."""
        return self.gradients.reference_logps(examples, self.config)


def fused(model: PeftModel, config: GRPOConfig, notice: Callable[[str], None]) -> Weights:
    """The base's weights for the fast path, room for the policy's adapter in them. Raises Unsupported."""
    architecture = describe(model)
    weights = Weights.fuse(model, architecture)
    merge = None
    if sum(projection.base_OI.nbytes for projection in weights.projections) > MERGED_SHARE * free_bytes(model.device):
        notice("memory is short: the adapter is applied beside the base weights, which is slower than a merged copy")
        merge = False
    weights.bind(adapter_tensors(model, lora.POLICY), config.lora_alpha / config.rank, merge)
    return weights


def check_context(architecture: Architecture, longest: int, model: PeftModel) -> None:
    """Raises Unsupported when sequences of `longest` tokens go beyond what the fast path knows exactly of the model."""
    known, own = architecture.context, context_of(model)
    if known is not None and known < min(longest, own or longest):
        raise Unsupported(f"beyond {known} tokens its rotary positions change, and this run may reach {longest}")


def corrected(config: GRPOConfig, dtype: torch.dtype, notice: Callable[[str], None]) -> GRPOConfig:
    """The config with a correction for the sampler where it leaves that open and 16-bit weights make it needed."""
    correction, name = config.sampler_correction, str(dtype).removeprefix("torch.")
    if correction.mode is not None:
        return config
    if dtype.itemsize > 2:
        if has_bounds(correction):
            notice(
                f"level, low and high of sampler_correction cannot act: weights are {name}, where engine and trainer "
                "agree, so nothing is corrected unless a mode is set"
            )
        return config
    notice(
        f"weights are {name}, so engine and trainer round differently: tokens are "
        f"weighted by the ratio of their probabilities, at most {correction.high} (sampler_correction)"
    )
    return config.model_copy(update={"sampler_correction": correction.model_copy(update={"mode": "truncate"})})


class FastPath:
    """The gradient by all ranks, put where the optimizer looks for it."""

    def __init__(self, ranks: Ranks, model: PeftModel) -> None:
        self._ranks = ranks
        self._parameters = lora.named_parameters(model)

    def gradient(
        self, examples: Sequence[Example], config: GRPOConfig, old_logps: list[Tensor | None] | None
    ) -> Gradient:
        settings, temperature = LossSettings.of(config), config.sampling_params.temperature
        gradient, tensors = self._ranks.gradient(examples, settings, temperature, old_logps)
        for name, tensor in tensors.items():
            grad = self._parameters[name].grad
            assert grad is not None
            grad += tensor.to(grad.device)
        return gradient

    def reference_logps(self, examples: Sequence[Example], config: GRPOConfig) -> list[Tensor]:
        return self._ranks.reference_logps(examples, config.sampling_params.temperature)
