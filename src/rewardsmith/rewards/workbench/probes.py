"""Texts that deserve no reward, made from the rows and from what the sources mention: an empty answer, the prompt
again, the right answer hidden among wrong ones, lists of all answers, tags without end. And one that does deserve it:
the reference's own text, which says what a right answer earns.

A function that looks for an answer in tags or behind `####` only shows what it takes when the probe comes in that
form, so most probes come plain and in each form that the sources mention. Nothing is run or scored here.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewardsmith.rewards.pool import Group

PROBES = {
    "empty": "an empty answer",
    "echo": "the prompt again",
    "hidden": "prose that names the right answer among wrong ones",
    "listed": "all candidate answers, one after another",
    "long": "a very long text that says nothing",
    "tags": "the tags and marks of the source, over and over",
    "reference": "the row's own columns as the answer",
}
REFERENCE = "reference"

NO_ANSWER = {"prompt", "split"}  # columns that hold none
SHORT = 60  # characters of an answer that can stand in a sentence
MOST_CANDIDATES = 40  # of one column
REPEATED = 20
LONG = 20_000  # characters
FILLER = (
    "There is more than one way to look at this. ",
    "Let us go through it slowly and with care. ",
    "Some of it is clear and some of it is less so. ",
    "In the end everything depends on how it is meant. ",
)
ANSWER_TAGS = {"answer", "final", "final_answer", "solution", "result", "output"}

# Not the names of groups in regular expressions, `(?P<name>`.
_TAG = re.compile(r"(?<!\(\?P)</?([A-Za-z][\w-]*)>")


@dataclass(frozen=True)
class Form:
    """How an answer is dressed."""

    before: str = ""
    after: str = ""

    def of(self, text: str) -> str:
        return f"{self.before}{text}{self.after}"


def forms(sources: Iterable[str]) -> list[Form]:
    """Plain first; then those that the texts in the sources mention: tags, `####`, `\\boxed{}`."""
    texts = list(_strings(sources))
    found = [Form()]
    if tags := _tags(texts):
        *others, last = tags
        found.append(Form("".join(f"<{tag}>Let me see.</{tag}>\n" for tag in others) + f"<{last}>", f"</{last}>"))
    if any("####" in text for text in texts):
        found.append(Form("#### "))
    if any("boxed" in text for text in texts):
        found.append(Form(r"\boxed{", "}"))
    return found


def probes(groups: Sequence[Group], sources: Sequence[str]) -> list[dict[str, list[str]]]:
    """For the row of each group, the texts by name of the probe. One that has nothing to be made of is left out."""
    known = forms(sources)
    columns = _candidates([group.example for group in groups])
    spam = _spam(known, _tags(_strings(sources)))
    long = ("".join(FILLER) * (LONG // len("".join(FILLER)) + 1))[:LONG]
    made = []
    for group in groups:
        own = {name: values for name in columns if (values := _short_values(group.example.get(name)))}
        decoys = {name: _decoys(values, columns[name], own) for name, values in own.items()}
        row = {
            "empty": [""],
            "echo": [form.of(group.prompt) for form in known],
            "hidden": [form.of(_prose(own, decoys)) for form in known] if own else [],
            "listed": [_list(own, decoys, form) for form in known] if own else [],
            "long": [form.of(long) for form in known],
            "tags": spam,
            REFERENCE: list(_reference(group.example, known)),
        }
        made.append({name: texts for name, texts in row.items() if texts})
    return made


# ---- what the sources mention ---------------------------------------------------------------------------------------


def _strings(sources: Iterable[str]) -> Iterator[str]:
    """Text constants, parts of f-strings among them, and what a setting such as `tag="answer"` makes a tag of."""
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.arguments):
                for setting, default in zip(node.kwonlyargs, node.kw_defaults, strict=True):
                    if "tag" in setting.arg and default is not None:
                        names = (inner.value for inner in ast.walk(default) if isinstance(inner, ast.Constant))
                        yield from (f"<{name}>" for name in names if isinstance(name, str))


def _tags(texts: Iterable[str]) -> list[str]:
    """In the order of their first mention, but what holds an answer last."""
    found = list(dict.fromkeys(tag for text in texts for tag in _TAG.findall(text)))
    return sorted(found, key=lambda tag: tag.lower() in ANSWER_TAGS)


def _spam(known: Sequence[Form], tags: Sequence[str]) -> list[str]:
    """Everything that could count as form, without content."""
    units = ["\n".join(f"<{tag}></{tag}>" for tag in tags)] if tags else []
    units += [form.of("") for form in known if form.before and not form.before.startswith("<")]
    return ["\n".join([unit] * REPEATED) for unit in units]


# ---- what the rows hold ---------------------------------------------------------------------------------------------


def _short_values(value: object) -> list[str]:
    """What in a column can stand in a sentence as an answer: texts and numbers, also inside lists and objects."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, Mapping):
        return [short for inner in value.values() for short in _short_values(inner)]
    if isinstance(value, list):
        return [short for inner in value for short in _short_values(inner)]
    text = str(value).strip()
    return [text] if text and len(text) <= SHORT and "\n" not in text else []


def _candidates(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """By column, the different short values that the rows have."""
    found: dict[str, dict[str, None]] = {}
    for example in examples:
        for name, value in example.items():
            if name not in NO_ANSWER and (values := _short_values(value)):
                found.setdefault(name, {}).update(dict.fromkeys(values))
    return {name: list(values) for name, values in found.items()}


def _decoys(own: Sequence[str], candidates: Sequence[str], all_own: Mapping[str, Sequence[str]]) -> list[str]:
    """Wrong answers for a row: what other rows have in that column, else something made up; two at least."""
    right = {value for values in all_own.values() for value in values}
    wrong = [value for value in candidates if value not in right][:MOST_CANDIDATES]
    if not wrong:
        wrong = [made for made in _made_up(own[0]) if made not in right] or ["something else"]
    return wrong if len(wrong) > 1 else wrong * 2


def _made_up(value: str) -> list[str]:
    try:
        number = float(value)
    except ValueError:
        return ["something else", "none of these"]
    return [f"{number + step:g}" for step in (1, 2, 3, 5, 8, 13, 21, 34)]


def _prose(own: Mapping[str, Sequence[str]], decoys: Mapping[str, Sequence[str]]) -> str:
    """The right answers are neither the first nor the last that is named, so a function that takes one of those is not
    fooled; one that looks whether the right answer is somewhere is."""
    sentences = []
    for name, values in own.items():
        first, last = decoys[name][0], decoys[name][1]
        sentences.append(f"It could be {', '.join([first, *values])} or {last}. ")
    return f"{''.join(sentences)}I cannot say which of them is right. {FILLER[0]}{FILLER[1]}".rstrip()


def _list(own: Mapping[str, Sequence[str]], decoys: Mapping[str, Sequence[str]], form: Form) -> str:
    """Each candidate in the form that is looked for, the right ones in the middle of the wrong ones."""
    lines: list[str] = []
    for name, values in own.items():
        wrong = decoys[name]
        lines += [*wrong[: len(wrong) // 2], *values, *wrong[len(wrong) // 2 :]]
    return "\n".join(form.of(line) for line in lines)


def _reference(example: Mapping[str, Any], known: Sequence[Form]) -> Iterator[str]:
    """Each column as an answer, and of a list each entry; a function that wants none of them rewards none."""
    for name, value in example.items():
        if name in NO_ANSWER or value is None or isinstance(value, bool):
            continue
        inner = _short_values(value) if isinstance(value, (list, Mapping)) else []
        for text in (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), *inner):
            yield from (form.of(text) for form in known)
