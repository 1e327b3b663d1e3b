"""What an imported OpenAI grader computes. These functions travel as text, in the reward that `openai_grader` makes.

Each stands alone: imports inside, nothing from this module but what it calls by name. Similarities go from 0 to 1.
"""

from typing import Any


def sample_of(completion: str) -> dict[str, Any]:
    """The sample of a grader: one text. `output_json` is None where the text is not JSON."""
    import json

    try:
        parsed = json.loads(completion)
    except (ValueError, RecursionError):
        parsed = None
    message = {"role": "assistant", "content": completion, "tool_calls": None}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    return {"output_text": completion, "output_json": parsed, "output_tools": [], "choices": choices}


def fill(parts: list[Any], item: dict[str, Any], sample: dict[str, Any]) -> str | None:
    """A template's text: `parts` are texts, or paths (lists) into item or sample.

    None if the sample lacks something: that is the model's doing. What the item lacks raises KeyError.
    """
    import json

    text = ""
    for part in parts:
        if isinstance(part, list):
            value: Any = {"item": item, "sample": sample}
            for key in part:
                try:
                    value = value[int(key)] if isinstance(value, list) else value[key]
                except (LookupError, TypeError, ValueError):
                    if part[0] == "item":
                        raise KeyError(f"the row has no {'.'.join(part[1:])}") from None
                    return None
            if value is None and part[0] == "sample":
                return None
            part = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text += part
    return text


def fuzzy_match(text: str, reference: str) -> float:
    """Twice the longest common subsequence of characters, over both lengths (the ratio of rapidfuzz)."""
    total = len(text) + len(reference)
    return 2 * common(text, reference) / total if total else 1.0


def common(one: Any, other: Any) -> int:
    """Length of the longest common subsequence: all of `one` in the bits of an int, a step for each of `other`."""
    places: dict[Any, int] = {}
    for place, element in enumerate(one):
        places[element] = places.get(element, 0) | 1 << place
    every = (1 << len(one)) - 1
    row = every
    for element in other:
        hit = row & places.get(element, 0)
        row = (row + hit | row - hit) & every
    return len(one) - row.bit_count()


def words_of(text: str, signs: bool) -> list[str]:
    """Words in their case with signs between them, or words in lower case alone."""
    import re

    return re.findall(r"\w+|[^\w\s]", text) if signs else re.findall(r"\w+", text.lower())


def runs_of(words: list[str], n: int) -> Any:
    """How many times each run of n words comes."""
    from collections import Counter

    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def bleu(text: str, reference: str) -> float:
    """BLEU of one sentence: geometric mean of the precisions of runs of 1 to 4 words, times the brevity penalty.

    No smoothing; a text of fewer than 4 words is judged by the runs it has.
    """
    import math

    given, wanted = words_of(text, True), words_of(reference, True)
    if not given or not wanted:
        return float(given == wanted)
    orders = range(1, min(4, len(given)) + 1)
    shares = [(runs_of(given, n) & runs_of(wanted, n)).total() / (len(given) - n + 1) for n in orders]
    if not all(shares):
        return 0.0
    brevity = min(1.0, math.exp(1 - len(wanted) / len(given)))
    return brevity * math.exp(sum(map(math.log, shares)) / len(shares))


def gleu(text: str, reference: str) -> float:
    """Google's BLEU: common runs of 1 to 4 words, over the larger number of such runs in either text."""
    given, wanted = words_of(text, True), words_of(reference, True)
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((runs_of(given, n) & runs_of(wanted, n)).total() for n in range(1, 5))
    most = max(sum(max(0, len(words) - n + 1) for n in range(1, 5)) for words in (given, wanted))
    return float(shared / most)


def rouge_n(text: str, reference: str, n: int) -> float:
    """F1 of the runs of n words that both have; case and signs do not count, stems are not taken."""
    given, wanted = runs_of(words_of(text, False), n), runs_of(words_of(reference, False), n)
    total = given.total() + wanted.total()
    return float(2 * (given & wanted).total() / total) if total else 0.0


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; case and signs do not count, stems are not taken."""
    given, wanted = words_of(text, False), words_of(reference, False)
    total = len(given) + len(wanted)
    return 2 * common(given, wanted) / total if total else 0.0
