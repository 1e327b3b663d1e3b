"""What training and serving need of a sampler: `Engine`, the `Completion` it gives, and how ids become text.

Two engines are built in: `fast.FastEngine`, and `plain.PlainEngine`, which is the measure for it and runs the models
that the fast one does not know. Prompts go in as ids, completions come out as ids with the log-probs they were drawn
with; text is made from the ids, never the other way round. Importing this loads neither transformers nor PEFT.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from rewardsmith.errors import ModelError
from rewardsmith.rollout.model.architecture import base_of
from rewardsmith.rollout.sampling import Support

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rewardsmith.config import SamplingParamsConfig
    from rewardsmith.rollout.adapter import Fingerprint

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `ids` includes the end-of-turn token or stop string that ended it, `text` does not.

    `logps` are natural logs, one for each id, under the distribution that the id was drawn from: the whole
    temperature-scaled one, or with top-k, top-p or min-p the renormalised one over `support`, which is None without.
    """

    ids: list[int]
    logps: list[float]
    finish_reason: Literal["stop", "length"]
    text: str = ""
    support: Support | None = None


class Engine(Protocol):
    def generate(
        self, prompts: Sequence[list[int]], num_generations: int, params: SamplingParamsConfig, seeds: Sequence[int]
    ) -> Generator[tuple[int, list[Completion]], None, None]:
        """`num_generations` completions of each prompt; `seeds` has one number per completion, group by group.

        Gives (index of the prompt, its whole group) as soon as a group is finished, each prompt once, in any order.
        Closing the generator ends what is still being sampled. Raises ModelError.
        """

    def load_adapter(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Take over the policy's adapter. Raises DeliveryError when it does not fit."""

    def fingerprint(self) -> Fingerprint:
        """Of the adapter that the next completion is sampled with."""


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Ids to text with nothing added, left out or tidied up."""
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def text_after(decode: Decode, before: int, ids: Sequence[int]) -> str:
    """`ids` as they read after the token `before`; alone, many tokenizers drop the space a word begins with."""
    head, whole = decode([before]), decode([before, *ids])
    return whole[len(head) :] if whole.startswith(head) else decode(ids)


def with_text(
    completion: Completion, prompt: Sequence[int], decode: Decode, stop_ids: Sequence[int], stop: Sequence[str] = ()
) -> Completion:
    """The completion of `prompt` with its text: without the end-of-turn token, up to the first of the stop strings."""
    ids = completion.ids
    text = text_after(decode, prompt[-1], ids[:-1] if ids[-1] in stop_ids else ids)
    ends = [end for string in stop if (end := text.find(string)) >= 0]
    return replace(completion, text=text[: min(ends, default=len(text))])


def ends_in_stop(ids: Sequence[int], before: int, decode: Decode, stop: Sequence[str]) -> bool:
    """Whether the newest of `ids` completed a stop string. `before` is the prompt's last token.

    Looks at the newest tokens only, as every one gives a byte at least, and at the whole text before it says yes.
    """
    reach = max((len(string.encode()) for string in stop), default=0)
    newest = [before, *ids[-reach - 4 :]][
        -reach - 4 :
    ]  # some more, as a tokenizer may drop the space in front of the first
    if not reach or not any(string in decode(newest) for string in stop):
        return False
    text = text_after(decode, before, ids)
    return any(string in text for string in stop)


def check_logps(logps: Sequence[float]) -> None:
    """Raises ModelError when a log-prob is no number."""
    if not all(map(math.isfinite, logps)):
        raise ModelError("the model's logits are not numbers; its weights or the adapter's are damaged")


def room_after(prompt: Sequence[int], context: int | None) -> int:
    """New tokens that fit the model's context after `prompt`. Raises ModelError when there is none."""
    room = sys.maxsize if context is None else context - len(prompt)
    if room < 1:
        raise ModelError(f"a prompt of {len(prompt)} tokens fills the model's context of {context}")
    return room


def text_config(model: PreTrainedModel | PeftModel) -> PretrainedConfig:
    """The part of a model's config that is about its language model."""
    return base_of(model).config.get_text_config(decoder=True)


def context_of(model: PreTrainedModel | PeftModel) -> int | None:
    """The most tokens that prompt and completion may have together; None where the model names no limit."""
    context: int | None = getattr(text_config(model), "max_position_embeddings", None)
    return context


def stop_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a turn, by the tokenizer and by the model's generation settings."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None})
