"""The arithmetic and the memory traffic that a rollout and an update cannot do without, from shapes and lengths.

A multiply-add counts as 2 operations. Counted: linear layers, the head for tokens that are sampled or trained,
attention over the positions that a token may see, LoRA in the update. Each unique prompt counts once, in the rollout
and in the update. Not counted: norms, activations, softmax, sampling, the optimizer, recomputation. A share of the
roofline that is made from these numbers is therefore on the low side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappush, heapreplace

from cases import Case

from rewardsmith.rollout.fast.engine import SLOTS


@dataclass(frozen=True)
class Work:
    """`flops`: floating-point operations; `bytes`: weights and KV cache read while decoding, 0 for an update."""

    flops: float
    bytes: float = 0.0


def linear_parameters(case: Case) -> int:
    """Weights of all linear layers but the head."""
    head = case.hidden // case.heads
    attention = case.hidden * head * (2 * case.heads + 2 * case.kv_heads)
    return case.layers * (attention + 3 * case.hidden * case.mlp)


def lora_parameters(case: Case) -> int:
    head = case.hidden // case.heads
    wide, narrow = case.heads * head, case.kv_heads * head
    sides = 2 * (case.hidden + wide) + 2 * (case.hidden + narrow) + 3 * (case.hidden + case.mlp)
    return case.layers * case.rank * sides


def attention_flops(case: Case, pairs: float) -> float:
    """Scores and weighted values for `pairs` of (query, key) positions, over all layers and heads."""
    return 4.0 * case.layers * case.hidden * pairs


def rollout(case: Case, prompts: Sequence[int], groups: Sequence[Sequence[int]]) -> Work:
    """Lengths of the prompts, and of the completions of each. As many decode together as our engine lets run."""
    linear, head = linear_parameters(case), case.vocab * case.hidden
    size = 2 if case.device == "cuda" else 4
    kv_bytes = 2 * case.layers * case.kv_heads * (case.hidden // case.heads) * size
    lengths = [length for group in groups for length in group]
    contexts = [p + t for p, group in zip(prompts, groups, strict=True) for length in group for t in range(1, length)]
    decoded = sum(lengths) - len(lengths)  # the first token of each comes from the prompt
    flops = 2.0 * linear * (sum(prompts) + decoded) + 2.0 * head * (len(prompts) + decoded)
    flops += attention_flops(case, sum(p * (p + 1) / 2 for p in prompts) + sum(contexts))
    weights = decode_steps(lengths, SLOTS[case.device]) * (linear + head) * size
    return Work(flops, weights + sum(contexts) * kv_bytes)


def decode_steps(lengths: Sequence[int], slots: int) -> int:
    """Times that the weights are read, with `slots` sequences at once, the next one starting where one ends."""
    ends: list[int] = []
    for length in lengths:
        if len(ends) < slots:
            heappush(ends, length)
        else:
            heapreplace(ends, ends[0] + length)
    return max(ends)


def update(case: Case, prompts: Sequence[int], groups: Sequence[Sequence[int]]) -> Work:
    """Forward, and a backward pass for activations and LoRA weights (none for base weights)."""
    lengths = [length for group in groups for length in group]
    tokens = sum(prompts) + sum(lengths) - len(lengths)  # the last token of each is not fed
    # Nothing below the first layer's q, k and v learns, so no gradient goes through these.
    through = linear_parameters(case) - case.hidden * (case.hidden // case.heads) * (case.heads + 2 * case.kv_heads)
    flops = 2.0 * (linear_parameters(case) + through) * tokens + 4.0 * lora_parameters(case) * tokens
    flops += 2.0 * 2.0 * case.vocab * case.hidden * sum(lengths)
    pairs = sum(p * (p + 1) / 2 for p in prompts)
    pairs += sum(n * p + n * (n - 1) / 2 for p, group in zip(prompts, groups, strict=True) for n in group)
    return Work(flops + 3.0 * attention_flops(case, pairs))
