"""The plain path: log-probs and gradients by the transformers model itself, padded micro-batch by micro-batch.

Slow enough to be obvious: the oracle for anything faster, and what runs a model that the fast path does not know. A
micro-batch is right-padded: with causal attention a real token never sees what stands after it, so neither mask nor
position ids are needed. The reference is the same model with the adapter off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rewardsmith.config import GRPOConfig
from rewardsmith.train.batch import Example, Gradient, has_gradient, token_batch
from rewardsmith.train.lora import POLICY
from rewardsmith.train.losses import LossSettings, token_losses

MICRO_BATCH_TOKENS = 2048  # padded tokens; for small models larger ones only fall out of a CPU's caches
MICRO_BATCH_LOGITS = 2**27  # floats of one micro-batch's logits: 512 MiB, and as much again for their gradient


@dataclass(frozen=True)
class MicroBatch:
    """`rows` are the places of its examples. Logits of the last `keep` positions of `ids_BT` predict the targets.

    `wanted_BK` marks, among those positions, the ones that predict a completion's token; `targets_N` are these tokens.
    `support_NS` holds the ids each could have been, -1 where there are fewer.
    """

    rows: list[int]
    lengths: list[int]
    ids_BT: Tensor
    keep: int
    wanted_BK: Tensor
    targets_N: Tensor
    support_NS: Tensor | None


def micro_batches(
    examples: Sequence[Example], rows: Sequence[int], vocab: int, device: torch.device
) -> Iterator[MicroBatch]:
    """The examples at `rows`, those of like length together, as many as the two limits allow and at least one."""
    limit = min(MICRO_BATCH_TOKENS, MICRO_BATCH_LOGITS // vocab)

    def length(row: int) -> int:
        return len(examples[row].prompt) + len(examples[row].completion)

    part: list[int] = []
    for row in sorted(rows, key=lambda row: (length(row), examples[row].prompt)):
        if part and (len(part) + 1) * length(row) > limit:
            yield collate(examples, part, device)
            part = []
        part.append(row)
    if part:
        yield collate(examples, part, device)


def collate(examples: Sequence[Example], rows: list[int], device: torch.device) -> MicroBatch:
    chosen = [examples[row] for row in rows]
    # The last token predicts nothing and is not fed.
    width = max(len(example.prompt) + len(example.completion) for example in chosen) - 1
    first = min(len(example.prompt) for example in chosen) - 1
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    wanted_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, example in enumerate(chosen):
        fed = (example.prompt + example.completion)[:-1]
        ids_BT[i, : len(fed)] = torch.tensor(fed)
        wanted_BT[i, len(example.prompt) - 1 : len(fed)] = True
    support_NS = _support(chosen)
    return MicroBatch(
        rows=rows,
        lengths=[len(example.completion) for example in chosen],
        ids_BT=ids_BT.to(device),
        keep=width - first,
        wanted_BK=wanted_BT[:, first:].to(device),
        targets_N=torch.tensor([token for example in chosen for token in example.completion], device=device),
        support_NS=None if support_NS is None else support_NS.to(device),
    )


def _support(examples: Sequence[Example]) -> Tensor | None:
    supports = [example.support for example in examples if example.support is not None]
    if not supports:
        return None
    assert len(supports) == len(examples), "the completions of a step are drawn with the same sampling parameters"
    ids = [ids_S.long() for support in supports for ids_S in torch.split(support.ids, support.offsets.diff().tolist())]
    padded_NS: Tensor = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    return padded_NS


def token_logps(model: torch.nn.Module, batch: MicroBatch, temperature: float, vocab: int) -> Tensor:
    """Log-probs of the completions' tokens, N of them, under the model as it is set now.

    Over the first `vocab` ids, or over the support, and at the sampling temperature, as the sampler has them.
    """
    logits_BKV = model(input_ids=batch.ids_BT, use_cache=False, logits_to_keep=batch.keep).logits
    logits_NV = logits_BKV[batch.wanted_BK][:, :vocab]
    # Float32 at least; a float64 model keeps its precision.
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    if batch.support_NS is None:
        return -torch.nn.functional.cross_entropy(logits_NV, batch.targets_N, reduction="none")
    possible_NS = logits_NV.gather(1, batch.support_NS.clamp(min=0)).masked_fill(batch.support_NS < 0, -torch.inf)
    logps_N: Tensor = logits_NV.gather(1, batch.targets_N[:, None]).squeeze(1) - possible_NS.logsumexp(1)
    return logps_N


class PlainPath:
    """Runs the policy of a PEFT model; `vocab` is the number of ids that can be sampled."""

    def __init__(self, model: PeftModel, vocab: int) -> None:
        self._model = model
        self._vocab = vocab

    def gradient(
        self, examples: Sequence[Example], config: GRPOConfig, old_logps: list[Tensor | None] | None = None
    ) -> Gradient:
        """See `update.GradientPath`."""
        settings, temperature = LossSettings.of(config), config.sampling_params.temperature
        self._model.set_adapter(POLICY)
        self._only_adapter_dropout()
        learned = [row for row, example in enumerate(examples) if has_gradient(example, settings)]
        found: list[Tensor | None] = [None] * len(examples)
        loss, kl, low, high, count = 0.0, 0.0, 0, 0, 0
        for batch in micro_batches(examples, learned, self._vocab, self._model.device):
            old = None if old_logps is None else [old_logps[row] for row in batch.rows]
            tokens = token_batch([examples[row] for row in batch.rows], old)
            if settings.beta:
                with torch.no_grad(), self._model.disable_adapter():
                    reference_logps_N = token_logps(self._model, batch, temperature, self._vocab)
                tokens = replace(tokens, reference_logps_N=reference_logps_N)
            logps_N = token_logps(self._model, batch, temperature, self._vocab)
            losses = token_losses(logps_N, tokens, settings)
            part: Tensor = (losses.losses_N * tokens.weights_N.to(logps_N)).sum()
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
            kl += 0.0 if losses.kl_N is None else float(losses.kl_N.sum())
            low += int(losses.clipped_low_N.sum())
            high += int(losses.clipped_high_N.sum())
            count += len(logps_N)
            for row, logps in zip(batch.rows, torch.split(logps_N.detach(), batch.lengths), strict=True):
                found[row] = logps
        return Gradient(loss, kl if settings.beta else None, low, high, count, found)

    @torch.no_grad()
    def policy_logps(self, examples: Sequence[Example], config: GRPOConfig) -> list[Tensor]:
        """Log-probs of each completion's tokens under the policy, without dropout, in the order of `examples`."""
        self._model.set_adapter(POLICY)
        self._model.eval()
        return [self._logps_of(examples, row, config) for row in range(len(examples))]

    @torch.no_grad()
    def reference_logps(self, examples: Sequence[Example], config: GRPOConfig) -> list[Tensor]:
        """The same under the reference: for a KL in the reward, which comes before the advantages."""
        self._model.eval()
        with self._model.disable_adapter():
            return [self._logps_of(examples, row, config) for row in range(len(examples))]

    def _logps_of(self, examples: Sequence[Example], row: int, config: GRPOConfig) -> Tensor:
        """One by one, without padding: the plainest way there is."""
        batch = collate(examples, [row], self._model.device)
        return token_logps(self._model, batch, config.sampling_params.temperature, self._vocab)

    def _only_adapter_dropout(self) -> None:
        """The base model's own dropout stays off: it would make the policy another one than the engine sampled with."""
        self._model.eval()
        for module in self._model.modules():
            if isinstance(module, LoraLayer) and POLICY in module.lora_dropout:
                module.lora_dropout[POLICY].train()
