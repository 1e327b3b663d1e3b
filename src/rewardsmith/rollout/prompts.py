"""Dataset rows as prompts: the text as the user wrote it, and the ids the model reads. Encoded once per job.

Text goes in verbatim (contract 2.3: users put the chat template and any prefill in it) or, when asked, as one user
turn of the tokenizer's chat template. Rows are parsed JSON from the job's dataset; `train.data` reads them and decides
which ones are held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rewardsmith.errors import ModelError


@dataclass(frozen=True)
class Prompt:
    """`row` is the row's number in the dataset, `text` its prompt column, `example` the whole row."""

    row: int
    text: str
    ids: list[int]
    example: dict[str, Any]


def make_prompts(
    rows: Sequence[tuple[int, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    apply_chat_template: bool,
    max_tokens: int | None,
) -> tuple[list[Prompt], int]:
    """Prompts of (number, row) pairs, and how many were left out for having more than `max_tokens` tokens.

    Raises ModelError when the tokenizer has no chat template to apply, or a prompt comes out without tokens.
    """
    texts = [row["prompt"] for _, row in rows]
    if apply_chat_template:
        texts = [_as_user_turn(tokenizer, text) for text in texts]
    prompts = []
    for (number, row), ids in zip(rows, _encoded(tokenizer, texts), strict=True):
        if not ids:
            raise ModelError(f"the prompt of row {number} has no tokens: {row['prompt'][:100]!r}")
        if max_tokens is None or len(ids) <= max_tokens:
            prompts.append(Prompt(number, row["prompt"], ids, row))
    return prompts, len(rows) - len(prompts)


def _as_user_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            "apply_chat_template is on, but the base model's tokenizer has no chat template; "
            "switch it off and write the prompts as the model expects them"
        )
    turn = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids with the beginning-of-text token where the tokenizer puts one, never twice, and nothing at the end.

    A tokenizer's own special tokens are not taken as they are: some append an end-of-text token to every text, and
    a chat template has the beginning token in its text already.
    """
    if not texts:
        return []
    start = tokenizer.bos_token_id
    starts = start is not None and tokenizer("a")["input_ids"][:1] == [start]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[start, *ids] if starts and ids[:1] != [start] else ids for ids in encoded]
