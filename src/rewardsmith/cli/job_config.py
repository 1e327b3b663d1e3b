"""The config of a job out of a JSON file, Python files of reward functions, and `key=value` settings, in this order.

Reward files are read as text and not run: only the text of each function travels anyway.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ConfigError, RewardSourceError
from rewardsmith.reward_config import RewardFunction, RewardFunctionsConfig
from rewardsmith.rewards import source as reward_source

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="JSON file with the fields of GRPOConfig.", show_default=False)
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--rewards",
        metavar="FILE.py[:NAME,...]",
        help="Reward functions: those named, else all top-level functions with three parameters. Repeatable.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One field, such as train_steps=200 or sampling_params.temperature=0.9. Repeatable.",
        show_default=False,
    ),
]


def read_config(file: Path | None, rewards: Sequence[str] | None, settings: Sequence[str] | None) -> GRPOConfig:
    """Raises ConfigError or RewardSourceError, naming the file and line or the setting."""
    fields = _read_json(file) if file else {}
    functions = RewardFunctionsConfig.of(fields.pop("rewardFns", None) or fields.pop("reward_fns", None) or {})
    for argument in rewards or []:
        for name, function in read_rewards(argument):
            functions[name] = function
    for setting in settings or []:
        _apply(setting, fields)
    return GRPOConfig(**fields, reward_fns=functions if len(functions) else None)


def read_rewards(argument: str) -> Iterator[tuple[str, RewardFunction]]:
    """The functions that `FILE.py` or `FILE.py:name,name` stands for, with their names."""
    file, colon, names = argument.rpartition(":")
    path, wanted = (Path(file), names.split(",")) if colon and file.endswith(".py") else (Path(argument), None)
    text = _read_text(path)
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise RewardSourceError(f"{path}, line {error.lineno}: {error.msg}") from None
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if wanted is None:
        wanted = [name for name, node in found.items() if len(node.args.posonlyargs + node.args.args) == 3]
        if not wanted:
            raise ConfigError(f"{path} has no top-level function with three parameters (prompt, completion, example)")
    for name in wanted:
        if name not in found:
            raise ConfigError(f"{path} has no top-level function {name!r}; it has: {', '.join(found) or 'none'}")
        yield name, _function(path, text, found[name])


def _function(path: Path, text: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> RewardFunction:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    source = "\n".join(text.splitlines()[first - 1 : node.end_lineno]) + "\n"
    # With as many lines above it as in the file, so that problems are found where the user sees them.
    problems = reward_source.check("\n" * (first - 1) + source)
    if problems:
        raise RewardSourceError("\n".join(f"{path}, {problem}" for problem in problems))
    return RewardFunction.from_source(source)


def _apply(setting: str, fields: dict[str, Any]) -> None:
    """`a.b=value` into nested dicts. A value is JSON where it can be, else text."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {setting!r}: write KEY=VALUE, such as train_steps=200")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *above, last = key.split(".")
    for name in above:
        inner = fields.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {setting!r}: {name!r} is already set to {inner!r}")
        fields = inner
    fields[last] = value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from None
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{path} holds a {type(fields).__name__}; a config is an object with the fields of GRPOConfig"
        )
    return fields


def _read_text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
