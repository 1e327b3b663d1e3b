"""The fast engine: fused weights, each prompt read once for its group, continuous batching, native kernels.

It computes what transformers computes for the families of `architecture` (tests hold it to that) and needs nothing but
`Weights`, so that a process without a transformers model can sample. `generate` is a loop over `Batch`, which serving
uses by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rewardsmith.rollout.adapter import Fingerprint, take_over
from rewardsmith.rollout.engine import Completion, decoder
from rewardsmith.rollout.fast.batch import Batch, Request
from rewardsmith.rollout.fast.decode import Decoder
from rewardsmith.rollout.fast.kernels import Kernels, choose
from rewardsmith.rollout.model.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rewardsmith.config import SamplingParamsConfig

# Sequences at once. On a CPU matrix products of fewer rows are slower, of more rows hardly faster; on a GPU each step
# reads all weights, whatever the number of rows (not measured).
SLOTS = {"cpu": 64, "cuda": 256}


class FastEngine:
    """Samples with `weights` as they are: base, bound adapter, merged or not.

    Without a tokenizer, completions have no text (`engine.with_text` adds it) and stop strings cannot be asked for.
    `between_tokens` is called once per decode step and may raise to end it all. At most `slots` sequences run, those of
    the device when None; for `cache_bytes` see `Batch`, for `blocked_bytes` see `Blocked`. `kernel` says what computes:
    "native" or "triton", or "torch: " and why.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        stop_ids: Sequence[int],
        vocab: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        between_tokens: Callable[[], None] = lambda: None,
        slots: int | None = None,
        cache_bytes: int | None = None,
        blocked_bytes: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        kernels = kernels or choose(weights.architecture, weights.embed_VH)
        self.kernel = kernels.name
        self.vocab = vocab
        self._weights = weights
        self._between_tokens = between_tokens
        self._decoder = Decoder(weights, kernels, vocab, blocked_bytes)
        self.batch = Batch(
            self._decoder,
            stop_ids=stop_ids,
            slots=slots or SLOTS[weights.embed_VH.device.type],
            cache_bytes=cache_bytes,
            decode=decoder(tokenizer) if tokenizer is not None else None,
        )

    @property
    def version(self) -> int:
        return self._weights.version

    def load_adapter(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Copies the tensors into the bound adapter, and makes the merged weights anew where there are any."""
        self.take_adapter(tensors, version)
        self.merge()

    def take_adapter(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Copies the tensors; for a caller that sees to `merge` itself."""
        take_over(self._weights.adapter(), tensors, version)
        self._weights.version = version

    def merge(self, shard: int = 0, shards: int = 1) -> None:
        """`Weights.merge`; what was copied of the weights before is forgotten, also of other processes' shards."""
        self._decoder.blocked.drop()
        self._weights.merge(shard, shards)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(self._weights.adapter())

    def generate(
        self,
        prompts: Sequence[list[int]],
        num_generations: int | Sequence[int],
        params: SamplingParamsConfig,
        seeds: Sequence[int],
    ) -> Generator[tuple[int, list[Completion]], None, None]:
        """As `Engine.generate`; `num_generations` may also be one number per prompt."""
        counts = [num_generations] * len(prompts) if isinstance(num_generations, int) else list(num_generations)
        groups: list[list[Completion | None]] = [[None] * count for count in counts]
        missing = list(counts)
        call = object()
        numbered = [(i, n) for i, count in enumerate(counts) for n in range(count)]
        keys: set[Hashable] = {(call, i, n) for i, n in numbered}
        try:
            for (i, n), seed in zip(numbered, seeds, strict=True):
                self.batch.submit(Request((call, i, n), prompts[i], seed, params))
            while any(missing):
                self._between_tokens()
                for request, completion in self.batch.step().finished:
                    _, i, n = request.key  # type: ignore[misc]
                    groups[i][n] = completion
                    missing[i] -= 1
                    if not missing[i]:
                        yield i, groups[i]  # type: ignore[misc]
        finally:
            self.batch.cancel(keys)
