"""Takes the values of secrets out of texts that people will read: prints, errors, tracebacks, events.

A value is found as it is and as programs commonly write it: in a repr, in JSON, in a URL; of a value with several
lines each long one too. Where a text was cut, the part of a value that is left at the cut goes as well. A value that a
program has changed in any other way is not found: this stops accidents, not a function that means to tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import quote, quote_plus

from rewardsmith.config import hidden_secret

# Shorter ones are words of any text: hiding every `1` or `yes` would tell more than it hides.
SHORTEST = 4
SHORTEST_LINE = 8

# What stands in a text where the sandbox has cut it (`inside.prints`, `inside.judge`, `sandbox.zygote`).
_CUT = re.compile(r"(\n?\[\d+ (?:more bytes were printed|bytes cut)\]\n?)")


def redactor(secrets: Mapping[str, str]) -> Callable[[str], str]:
    """A function that puts `[secret NAME]` in the place of each value."""
    names = {form: name for name, value in secrets.items() for form in _forms(value)}
    if not names:
        return lambda text: text
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))

    def redact(text: str) -> str:
        text = pattern.sub(lambda found: hidden_secret(names[found[0]]), text)
        parts = _CUT.split(text)  # text, mark, text, mark, text
        for place in range(1, len(parts), 2):
            for form, name in names.items():
                parts[place - 1] = _without_beginning(parts[place - 1], form, hidden_secret(name))
                parts[place + 1] = _without_end(parts[place + 1], form, hidden_secret(name))
        return "".join(parts)

    return redact


def shown_after_all(secrets: Mapping[str, str]) -> list[str]:
    """The names of those that are too short to be taken out of texts."""
    return [name for name, value in secrets.items() if not any(_forms(value))]


def _forms(value: str) -> Iterator[str]:
    lines = [line.strip() for line in value.splitlines()]
    for text in (value, value.strip(), *(line for line in lines if len(line) >= SHORTEST_LINE)):
        if len(text) >= SHORTEST:
            yield from (text, repr(text)[1:-1], json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
            yield from (quote(text, errors="replace"), quote(text, "", errors="replace"))
            yield quote_plus(text, errors="replace")


def _without_beginning(text: str, value: str, instead: str) -> str:
    """Without the first part of a value, if the text ends in the middle of one."""
    at = text.find(value[:SHORTEST], max(0, len(text) - len(value)))
    while at >= 0:
        if value.startswith(text[at:]):
            return text[:at] + instead
        at = text.find(value[:SHORTEST], at + 1)
    return text


def _without_end(text: str, value: str, instead: str) -> str:
    """Without the last part of a value, if the text begins in the middle of one."""
    at = text.rfind(value[-SHORTEST:], 0, len(value))
    while at >= 0:
        end = at + SHORTEST
        if value.endswith(text[:end]):
            return instead + text[end:]
        at = text.rfind(value[-SHORTEST:], 0, end - 1)
    return text
