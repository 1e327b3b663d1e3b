"""Other settings for a reward function, written into the text that travels.

A setting is a keyword-only parameter with a default: `def near(prompt, completion, example, *, margin=2)`. Nobody
passes it in a job, so another value has to be in the text. Works for the functions of this library and for your own.
Nothing is run here but `repr` of the values.
"""

import ast
from collections.abc import Callable
from typing import Any

from rewardsmith.errors import ConfigError, RewardSourceError
from rewardsmith.reward_config import RewardFunction
from rewardsmith.rewards.source import SourceError, source_of


def with_settings(function: Callable[..., Any], /, **settings: Any) -> RewardFunction:
    """`function` as a RewardFunction in which its keyword-only parameters have other defaults.

    `with_settings(numeric_match, column="gold", weight=0.5)`: what is no setting of the function is one of
    RewardFunction (`weight`, `on_error`, ...). Values are plain data: text, numbers, True, False, None, and lists,
    tuples, dicts and sets of them. Raises ConfigError for an unknown name or another value, RewardSourceError as
    `from_callable` does.
    """
    try:
        text = source_of(function, settings.get("per", "completion"))
    except SourceError as error:
        raise RewardSourceError(str(error)) from None
    (definition,) = ast.parse(text).body
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = definition.args
    defaults = {
        argument.arg: default for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }
    around = {name: value for name, value in settings.items() if name not in defaults}
    if unknown := around.keys() - (RewardFunction.model_fields.keys() - {"encoded_fn"}):
        known = ", ".join(defaults) or "none"
        raise ConfigError(f"{definition.name!r} has no setting {min(unknown)!r}; its settings: {known}")
    lines = text.encode().splitlines(keepends=True)
    for name, default in reversed(defaults.items()):  # from the end, so that earlier places stay where they are
        if name in settings and default is not None:
            written = as_text(settings[name], f"setting {name!r} of {definition.name!r}")
            lines = _replaced(lines, default, written.encode())
    return RewardFunction.from_source(b"".join(lines).decode(), **around)


def as_text(value: object, what: str) -> str:
    """Python text that makes `value` again. Raises ConfigError, which begins with `what`, if it is not plain data."""
    written = repr(value)
    try:
        same = ast.literal_eval(written) == value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        same = False
    if not same:
        kind = type(value).__name__
        raise ConfigError(f"{what} is a {kind} that cannot be written as text; give text, numbers, lists or dicts")
    return written


def _replaced(lines: list[bytes], node: ast.expr, written: bytes) -> list[bytes]:
    """The lines with `written` in the place of `node`; positions of the syntax tree count bytes."""
    assert node.end_lineno is not None
    first, last = node.lineno - 1, node.end_lineno - 1
    joined = lines[first][: node.col_offset] + written + lines[last][node.end_col_offset :]
    return [*lines[:first], joined, *lines[last + 1 :]]
