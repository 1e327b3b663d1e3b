"""Has the answer the right form? Tags in their order, or a pattern. Neither looks at what the answer says.

Each function stands alone; settings are keyword-only parameters.
"""

from typing import Any


def format_tags(
    prompt: str,
    completion: str,
    example: dict[str, Any],
    *,
    tags: tuple[str, ...] = ("think", "answer"),
    opened: bool = False,
    partial: bool = False,
) -> float:
    """1 for one block of each tag, in this order, none of them empty, and nothing but blanks between and behind them.

    Range: 0 or 1; with `partial` 0 to 1.
    Reads: no column.
    Settings: `tags`, their names; `opened`: the prompt ends with the first opening tag, so the completion starts inside
    that block; `partial`: each opening and closing tag that stands there exactly once earns an equal share, and the
    whole form a last one (five shares for two tags).
    Gamed by: any words between the tags: pair it with a reward for the answer, of larger weight. Repeated tags lose.
    """
    text = f"<{tags[0]}>{completion}" if opened else completion
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    once = [text.count(mark) == 1 for mark in marks]
    gaps, rest = [], text
    for mark in marks:
        gap, _, rest = rest.partition(mark)
        gaps.append(gap)
    insides, outsides = gaps[1::2], [*gaps[2::2], rest]
    whole = all(once) and not gaps[0] and not "".join(outsides).strip() and all(inside.strip() for inside in insides)
    return (sum(once) + whole) / (len(marks) + 1) if partial else float(whole)


def regex_match(
    prompt: str,
    completion: str,
    example: dict[str, Any],
    *,
    pattern: str = "",
    column: str = "pattern",
    whole: bool = True,
) -> float:
    """1 if the completion matches a regular expression of Python; a dot matches line breaks too.

    Range: 0 or 1.
    Reads: `column` where no pattern is set.
    Settings: `pattern`; `whole=False` looks for it anywhere in the completion.
    Gamed by: every text that fits: `.*` fits all, and with `whole=False` a long list of candidates holds the right one.
    A pattern with nested repeats, such as `(a+)+`, can run until the call's time is over.
    """
    import re

    wanted = pattern or example[column]
    return float(bool((re.fullmatch if whole else re.search)(wanted, completion, re.DOTALL)))
