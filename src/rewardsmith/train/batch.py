"""Trained completions as padded micro-batches, and the log-probs of their tokens under a model.

A micro-batch is right-padded: with causal attention a real token never sees what stands after it, so neither mask nor
position ids are needed. Tokens leave here flat (N of them in a micro-batch), with the row each belongs to; nothing
downstream knows of padding. Weights of the loss come from `grpo.weights` over the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MICRO_BATCH_TOKENS = 2048  # padded tokens; for small models larger ones only fall out of a CPU's caches
MICRO_BATCH_LOGITS = 2**27  # floats of one micro-batch's logits: 512 MiB, and as much again for their gradient


@dataclass(frozen=True)
class Example:
    """One completion to learn from: ids of prompt and completion, and what `grpo` makes of its score."""

    prompt: list[int]
    completion: list[int]
    advantage: float
    weight: float


@dataclass(frozen=True)
class MicroBatch:
    """`ids_BT` holds prompts with their completions; logits of the last `keep` positions predict the targets.

    `wanted_BK` marks, among those positions, the ones that predict a completion's token; `targets_N` are these tokens.
    """

    ids_BT: Tensor
    keep: int
    wanted_BK: Tensor
    targets_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor


def micro_batches(examples: Sequence[Example], vocab: int, device: torch.device) -> Iterator[MicroBatch]:
    """Examples of like length together, as many as the two limits allow and at least one."""
    limit = min(MICRO_BATCH_TOKENS, MICRO_BATCH_LOGITS // vocab)
    by_length = sorted(examples, key=lambda example: (len(example.prompt) + len(example.completion), example.prompt))
    rows: list[Example] = []
    for example in by_length:
        if rows and (len(rows) + 1) * (len(example.prompt) + len(example.completion)) > limit:
            yield collate(rows, device)
            rows = []
        rows.append(example)
    if rows:
        yield collate(rows, device)


def collate(rows: Sequence[Example], device: torch.device) -> MicroBatch:
    # The last token predicts nothing and is not fed.
    width = max(len(row.prompt) + len(row.completion) for row in rows) - 1
    first = min(len(row.prompt) for row in rows) - 1
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    wanted_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        fed = (row.prompt + row.completion)[:-1]
        ids_BT[i, : len(fed)] = torch.tensor(fed)
        wanted_BT[i, len(row.prompt) - 1 : len(fed)] = True
    lengths_B = torch.tensor([len(row.completion) for row in rows])
    dtype = torch.float64
    return MicroBatch(
        ids_BT=ids_BT.to(device),
        keep=width - first,
        wanted_BK=wanted_BT[:, first:].to(device),
        targets_N=torch.tensor([token for row in rows for token in row.completion], device=device),
        advantages_N=torch.tensor([row.advantage for row in rows], dtype=dtype).repeat_interleave(lengths_B).to(device),
        weights_N=torch.tensor([row.weight for row in rows], dtype=dtype).repeat_interleave(lengths_B).to(device),
    )


def token_logps(model: torch.nn.Module, batch: MicroBatch, temperature: float, vocab: int) -> Tensor:
    """Log-probs of the completions' tokens, N of them, under the model as it is set now.

    Over the first `vocab` ids and at the sampling temperature, as `rollout.sampling.log_probs` has them.
    """
    logits_BKV = model(input_ids=batch.ids_BT, use_cache=False, logits_to_keep=batch.keep).logits
    logits_NV = logits_BKV[batch.wanted_BK][:, :vocab]
    # Float32 at least; a float64 model keeps its precision.
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    return -torch.nn.functional.cross_entropy(logits_NV, batch.targets_N, reduction="none")
