"""Gentle pressure on form: not too long, not the same again. To be added to a reward for the answer, never alone.

Each function stands alone; settings are keyword-only parameters. They see text, so they count words, not tokens.
"""

from typing import Any


def soft_overlong(
    prompt: str, completion: str, example: dict[str, Any], *, longest: int = 400, buffer: int = 100
) -> float:
    """0 up to `longest - buffer` words, then falling evenly to -1 at `longest` words.

    Range: -1 to 0.
    Reads: no column.
    Settings: `longest` and `buffer` in words. A run without a blank counts one more word for each 16 characters.
    Gamed by: saying nothing: an empty answer is never punished. Keep its weight below that of the right answer.
    """
    if not 0 < buffer <= longest:
        raise ValueError(f"buffer must be from 1 to longest, not {buffer} of {longest}")
    words = sum(1 + len(run) // 16 for run in completion.split())
    return max(-1.0, min(0, longest - buffer - words) / buffer)


def repetition_penalty(
    prompt: str, completion: str, example: dict[str, Any], *, n: int = 3, most: float = 1.0
) -> float:
    """0 if no run of `n` words comes twice, towards `-most` the more of them do.

    Range: -most to 0.
    Reads: no column.
    Settings: `n` words in a run, any case; `most` is the punishment for nothing but repetition.
    Gamed by: an empty or short answer (fewer than n words cannot repeat), or by small changes in what is repeated.
    """
    words = completion.lower().split()
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return most * (len(set(runs)) / len(runs) - 1) if runs else 0.0
