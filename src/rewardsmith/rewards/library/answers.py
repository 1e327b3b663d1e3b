"""Is the answer the right one? Text compared as text, and numbers compared as numbers.

The reference comes from a column of the row. Each function stands alone; settings are keyword-only parameters.
"""

from typing import Any


def exact_match(
    prompt: str, completion: str, example: dict[str, Any], *, column: str = "answer", tag: str = "", loose: bool = False
) -> float:
    """1 if the answer is the reference, or one of several references; else 0.

    Range: 0 or 1.
    Reads: `column`, a text or number, or a list of accepted ones.
    Settings: `tag="answer"` takes what is inside the only <answer> </answer> of the completion instead of all of it;
    `loose` ignores case, punctuation and the words a, an, the.
    Gamed by: guessing, where the references are few (yes or no, four letters): watch the share of each answer. Several
    tagged answers earn nothing, and neither does the reference within a longer text.
    """
    import re

    def plain(value: object) -> str:
        text = str(value).strip()
        if not loose:
            return text
        lowered = " ".join(text.lower().split())
        words = re.sub(r"[^\w\s]", "", lowered).split()
        # An answer that is nothing but an article or a sign, the letter A of a choice for one, stays what it is.
        return " ".join(word for word in words if word not in ("a", "an", "the")) or lowered

    accepted = example[column] if isinstance(example[column], list) else [example[column]]
    for reference in accepted or [""]:
        if isinstance(reference, dict | list) or not str(reference).strip():
            raise ValueError(f"column {column!r} needs a text, a number or a list of them, not {example[column]!r}")
    answer = completion
    if tag:
        if completion.count(f"<{tag}>") != 1 or completion.count(f"</{tag}>") != 1:
            return 0.0
        answer = completion.partition(f"<{tag}>")[2]
        if f"</{tag}>" not in answer:
            return 0.0
        answer = answer.partition(f"</{tag}>")[0]
    return float(plain(answer) in [plain(reference) for reference in accepted])


def numeric_match(
    prompt: str,
    completion: str,
    example: dict[str, Any],
    *,
    column: str = "answer",
    anywhere: bool = False,
    tail: int = 300,
    tolerance: float = 0.0,
    wrong: float = 0.0,
) -> float:
    """1 if the last `#### number` of the completion is the reference, as in GSM8K; commas and a $ do not count.

    Range: 0 to 1: 1 right, `wrong` for another number in the right form, 0 for no number.
    Reads: `column`, a number or its text; of a whole GSM8K solution the number after the last ####.
    Settings: `anywhere` takes the last number with or without ####; only the last `tail` characters are read;
    `tolerance` is the largest difference that still counts as right; `wrong` is what the form alone earns.
    Gamed by: `anywhere`: ending with whatever number is likely, without any work. Numbers are compared by value, and
    only the last one is read, so a list of guesses is one guess.
    """
    import re
    from decimal import Decimal

    number = r"[-+]?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"

    def value(text: str) -> Decimal:
        return Decimal(text.replace(",", "").replace("$", ""))

    reference = re.fullmatch(number, str(example[column]).rpartition("####")[2].strip())
    if reference is None:
        raise ValueError(f"column {column!r} holds no number: {str(example[column])[:100]!r}")
    # A minus sign behind a digit or a bracket is a subtraction.
    pattern = rf"(?<![\w.)])({number})" if anywhere else rf"####\s*({number})"
    last = None
    for found in re.finditer(pattern, completion):
        last = found
    if last is None or last.start() < len(completion) - tail:
        return 0.0
    reached, wanted = value(last[1]), value(reference[0])
    return 1.0 if reached == wanted or abs(reached - wanted) <= tolerance else wrong
