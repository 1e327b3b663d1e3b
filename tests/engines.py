"""Engines of every kind over one small model with an adapter that does something, and what to ask of them."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import WORDS, random_model, tokenizer

from rewardsmith.config import SamplingParamsConfig
from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.rollout.engine import Completion, Engine, stop_ids
from rewardsmith.rollout.fast.engine import FastEngine
from rewardsmith.rollout.fast.kernels import TorchKernels
from rewardsmith.rollout.model.architecture import describe
from rewardsmith.rollout.model.weights import Weights
from rewardsmith.rollout.plain import PlainEngine
from rewardsmith.rollout.sampling import completion_seed

KINDS = ("plain", "native", "torch")
VOCAB, END = len(WORDS), 1
# Ragged, one of a single token, one that comes twice, one longer than a page of the cache.
PROMPTS = [[5, 6, 7], [9], [12, 3, 3, 8, 20, 11, 4, 9, 10, 11, 2, 2, 25, 7, 16, 4, 21, 5], [5, 6, 7]]


def adapted(family: str, dtype: torch.dtype = torch.float32, strength: float = 0.1) -> PeftModel:
    model = get_peft_model(
        random_model(family), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), adapter_name="rollout"
    )
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_tensors(model, "rollout").values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * strength)
    return model.to(dtype)


def weights_of(model: PeftModel, merge: bool = True) -> Weights:
    tensors = adapter_tensors(model, "rollout")
    weights = Weights.fuse(model, describe(model))
    weights.bind(tensors, scaling=2.0, merge=merge)
    for name, tensor in weights.adapter().items():
        tensor.copy_(tensors[name])
    weights.merge()
    return weights


def make_engine(kind: str, model: PeftModel, words: Any = None, merge: bool = True, **settings: Any) -> Engine:
    words = words or tokenizer()
    if kind == "plain":
        return PlainEngine(model, words, **settings)
    weights = weights_of(model, merge)
    kernels = TorchKernels(weights.architecture) if kind == "torch" else None
    engine = FastEngine(
        weights, stop_ids=stop_ids(model, words), vocab=VOCAB, tokenizer=words, kernels=kernels, **settings
    )
    assert engine.kernel.startswith(kind)
    return engine


def generate(
    engine: Engine, prompts: Sequence[list[int]], count: int, params: SamplingParamsConfig, seed: int = 0
) -> list[list[Completion]]:
    """Whole groups in the order of the prompts."""
    groups = dict(engine.generate(prompts, count, params, seeds_for(len(prompts) * count, seed)))
    assert sorted(groups) == list(range(len(prompts)))
    return [groups[i] for i in range(len(prompts))]


def seeds_for(count: int, seed: int = 0) -> list[int]:
    return [completion_seed(seed, 1, i) for i in range(count)]


def ids(groups: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in groups]


@torch.no_grad()
def whole_logps(model: Any, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
    """Log-probs after each position of the completion, from one forward over the whole text: no cache, no batch."""
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :VOCAB]
    return (logits / temperature).log_softmax(-1)


def largest_error(model: Any, prompt: list[int], completion: Completion, temperature: float) -> float:
    """Of the completion's log-probs against one forward, renormalised over its support where it has one."""
    expected_TV = whole_logps(model, prompt, completion.ids, temperature)
    if completion.support is not None:
        possible_TV = torch.zeros_like(expected_TV, dtype=torch.bool)
        for token in range(len(completion.ids)):
            possible_TV[token, completion.support[token].long()] = True
        expected_TV = expected_TV.masked_fill(~possible_TV, -torch.inf).log_softmax(-1)
    chosen_T = expected_TV.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
    return float((chosen_T - torch.tensor(completion.logps)).abs().max())
