"""OpenAI's grader JSON as a RewardFunction: string_check, text_similarity, python, score_model, and multi of them.

Templates, metric names and the formula are checked here; what is computed later is in `openai_scores`, whose functions
go along as text. The formula becomes a Python expression of numbers, scores and eight functions, nothing else. What
cannot be carried over is refused by name. Nothing of the grader is run here.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from rewardsmith.errors import ConfigError
from rewardsmith.reward_config import RewardFunction
from rewardsmith.rewards.doors import openai_scores as scores
from rewardsmith.rewards.doors.carry import carry, indented, reward_text
from rewardsmith.rewards.library.judge import llm_judge

Grader = Mapping[str, Any]

_FIELDS = {
    "string_check": {"input", "reference", "operation"},
    "text_similarity": {"input", "reference", "evaluation_metric", "pass_threshold"},
    "python": {"source", "image_tag"},
    "score_model": {"input", "model", "range", "sampling_params", "pass_threshold"},
    "multi": {"graders", "calculate_output"},
}
_CHECKS = {
    "eq": "text == reference",
    "ne": "text != reference",
    "like": "reference in text",
    "ilike": "reference.lower() in text.lower()",
}
_METRICS: dict[str, tuple[Callable[..., float], str]] = {
    "fuzzy_match": (scores.fuzzy_match, "fuzzy_match(text, reference)"),
    "bleu": (scores.bleu, "bleu(text, reference)"),
    "gleu": (scores.gleu, "gleu(text, reference)"),
    "rouge_l": (scores.rouge_l, "rouge_l(text, reference)"),
    **{f"rouge_{n}": (scores.rouge_n, f"rouge_n(text, reference, {n})") for n in range(1, 6)},
}
_NO_METRIC = {
    "cosine": "it needs an embedding model",
    "meteor": "it needs a dictionary of synonyms and stems",
}
_NO_SAMPLE = {"output_tools", "choices", "output_audio"}
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**", ast.UAdd: "+", ast.USub: "-"}
_FUNCTIONS = {
    "min": "min({})",
    "max": "max({})",
    "abs": "abs({})",
    "floor": "float(math.floor({}))",
    "ceil": "float(math.ceil({}))",
    "exp": "math.exp({})",
    "sqrt": "math.sqrt({})",
    "log": "math.log({})",
}


def from_openai_grader(grader: Grader | str, **settings: Any) -> RewardFunction:
    """A RewardFunction that scores as the grader does. `grader` is the JSON object, or its text.

    `item` is the row, `sample.output_text` the completion; where a template needs JSON that the completion is not, the
    score is 0. A score_model asks the endpoint of `llm_judge` (JUDGE_URL, JUDGE_API_KEY; JUDGE_MODEL overrules the
    grader's model). `image_tag` and `pass_threshold` change no score and are passed over. `settings` are those of
    RewardFunction. Raises ConfigError or RewardSourceError, naming what cannot be carried over.
    """
    try:
        given = json.loads(grader) if isinstance(grader, str) else grader
    except ValueError as error:
        raise ConfigError(f"the grader is not JSON: {error}") from None
    made = _Translation()
    call = made.add("graded", given, "the grader")
    carried = carry(scores.sample_of, *dict.fromkeys(made.needs))
    ending = f"sample = sample_of(completion)\nreturn {call}\n"
    about = f"An OpenAI grader of type {given['type']}."
    source = reward_text(about, [carried, *made.parts, ending], is_async=bool(made.waiting))
    return RewardFunction.from_source(source, **settings)


class _Translation:
    """The functions made so far as text, one for each grader; what they need; and the names of the async ones."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.needs: list[Callable[..., Any]] = []
        self.waiting: set[str] = set()

    def add(self, name: str, grader: Any, where: str) -> str:
        """Add `def name()`, which returns the score of `grader`, and give the text that calls it."""
        if not isinstance(grader, Mapping):
            raise ConfigError(f"{where} is not a JSON object but {grader!r}")
        kind = grader.get("type")
        if kind not in _FIELDS:
            raise ConfigError(f"{where} has type {kind!r}; known are {', '.join(_FIELDS)}")
        if unknown := grader.keys() - _FIELDS[kind] - {"type", "name"}:
            raise ConfigError(f"{where}: a {kind} has no field {min(unknown)!r}")
        lacking = _FIELDS[kind] - grader.keys() - {"pass_threshold", "image_tag", "range", "sampling_params"}
        if lacking:
            raise ConfigError(f"{where}: a {kind} needs the field {min(lacking)!r}")
        lines = getattr(self, f"_{kind}")(name, grader, where)
        waits = kind == "score_model" or any(inner.startswith(f"{name}_") for inner in self.waiting)
        self.waiting |= {name} if waits else set()
        self.parts.append(f"{'async ' if waits else ''}def {name}():\n" + indented("\n".join(lines) + "\n"))
        return f"{'await ' if waits else ''}{name}()"

    def _string_check(self, name: str, grader: Grader, where: str) -> list[str]:
        check = _CHECKS.get(grader["operation"])
        if check is None:
            raise ConfigError(f"{where}: no operation {grader['operation']!r}; known are {', '.join(_CHECKS)}")
        return [*self._both_texts(grader, where), f"return float({check})"]

    def _text_similarity(self, name: str, grader: Grader, where: str) -> list[str]:
        metric = grader["evaluation_metric"]
        if metric not in _METRICS:
            reason = _NO_METRIC.get(metric, f"known are {', '.join(_METRICS)}")
            raise ConfigError(f"{where}: the metric {metric!r} is not there: {reason}")
        function, call = _METRICS[metric]
        self.needs.append(function)
        return [*self._both_texts(grader, where), f"return {call}"]

    def _both_texts(self, grader: Grader, where: str) -> list[str]:
        self.needs.append(scores.fill)
        parts = {key: _template(grader[key], f"{key} of {where}") for key in ("input", "reference")}
        return [
            f"text = fill({parts['input']!r}, example, sample)",
            f"reference = fill({parts['reference']!r}, example, sample)",
            "if text is None or reference is None:",
            "    return 0.0",
        ]

    def _python(self, name: str, grader: Grader, where: str) -> list[str]:
        try:
            tree = ast.parse(grader["source"])
        except (SyntaxError, ValueError, TypeError) as error:
            raise ConfigError(f"the source of {where} cannot be read: {error}") from None
        grade = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "grade"]
        if not grade or len(grade[-1].args.args) != 2:
            raise ConfigError(f"the source of {where} has no `def grade(sample, item)`")
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                raise ConfigError(
                    f"the source of {where} changes the global {node.names[0]!r}; no other call would see it"
                )
        # Inside a function there is no import from the future.
        lines = [line for line in grader["source"].split("\n") if not line.startswith("from __future__ import")]
        module = "def module():\n" + indented("\n".join([*lines, "return grade"]) + "\n")
        return [module, "return module()(sample, example)"]

    def _score_model(self, name: str, grader: Grader, where: str) -> list[str]:
        self.needs += [scores.fill, llm_judge]
        asked = grader["input"]
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        messages = []
        for number, message in enumerate(asked):
            place = f"message {number} of {where}"
            content = message.get("content")
            if isinstance(content, Mapping) and content.get("type") in ("input_text", "output_text"):
                content = content["text"]
            if not isinstance(content, str):
                raise ConfigError(f"{place} is not a text; images and sounds cannot be carried over")
            messages.append((str(message.get("role", "user")), _template(content, place)))
        low, high = grader.get("range") or (0.0, 1.0)
        options = dict(grader.get("sampling_params") or {})
        if "max_completions_tokens" in options:  # as the grader's documents spell it
            options["max_completion_tokens"] = options.pop("max_completions_tokens")
        settings = f"lowest={float(low)!r}, highest={float(high)!r}, model={grader['model']!r}, options={options!r}"
        return [
            f"texts = [(role, fill(parts, example, sample)) for role, parts in {messages!r}]",
            "if any(text is None for _, text in texts):",
            f"    return {float(low)!r}",
            "messages = [{'role': role, 'content': text} for role, text in texts]",
            f"share = await llm_judge(prompt, completion, example, messages=messages, {settings})",
            f"return {float(low)!r} + {float(high) - float(low)!r} * share",
        ]

    def _multi(self, name: str, grader: Grader, where: str) -> list[str]:
        inner = grader["graders"]
        if not isinstance(inner, Mapping) or not inner:
            raise ConfigError(f"{where} has no graders by name")
        calls = []
        for number, (key, each) in enumerate(inner.items()):
            calls.append(f"{key!r}: float({self.add(f'{name}_{number}', each, f'grader {key!r}')})")
        formula = _formula(grader["calculate_output"], set(inner), where)
        return ["import math", f"scores = {{{', '.join(calls)}}}", "print(scores)", f"return {formula}"]


def _template(text: Any, where: str) -> list[Any]:
    """Texts and paths, in turn. Raises ConfigError for a namespace or a part of the sample that is not there."""
    if not isinstance(text, str):
        raise ConfigError(f"the {where} is not a text")
    parts: list[Any] = []
    for number, piece in enumerate(re.split(r"\{\{(.*?)\}\}", text, flags=re.DOTALL)):
        if number % 2 == 0:
            parts += [piece] if piece else []
            continue
        path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", piece.strip()).split(".")
        if path[0] not in ("item", "sample") or len(path) < 2 or not all(path):
            raise ConfigError(
                f"the {where} has {{{{{piece}}}}}; only item.<column> and sample.output_text, .output_json are there"
            )
        if path[0] == "sample" and path[1] not in ("output_text", "output_json"):
            reason = "a completion is one text here" if path[1] in _NO_SAMPLE else "there is no such part"
            raise ConfigError(
                f"the {where} has {{{{{piece}}}}}: {reason}; use sample.output_text or sample.output_json"
            )
        parts.append(path)
    return parts


def _formula(text: Any, names: set[str], where: str) -> str:
    """The formula as a Python expression of `scores`, with numbers as floats, so that a power overflows at once."""

    def read(node: ast.AST) -> str:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return repr(float(value))
            case ast.Name(id=name) if name in names:
                return f"scores[{name!r}]"
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _SIGNS:
                return f"({read(left)} {_SIGNS[type(sign)]} {read(right)})"
            case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _SIGNS:
                return f"({_SIGNS[type(sign)]}{read(operand)})"
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                if (len(arguments) == 1) is (name not in ("min", "max")) and arguments:
                    return _FUNCTIONS[name].format(", ".join(map(read, arguments)))
        raise ConfigError(
            f"calculate_output of {where} has {ast.unparse(node)!r}; it may hold numbers, + - * / ^, "
            f"{', '.join(_FUNCTIONS)} and its graders: {', '.join(sorted(names))}"
        )

    try:
        return read(ast.parse(str(text).replace("^", "**"), mode="eval").body)
    except (SyntaxError, OverflowError, RecursionError, MemoryError):
        raise ConfigError(f"calculate_output of {where} is no formula: {str(text)[:200]!r}") from None
