"""Reward functions as verifiers takes them: arguments by name, from the rollout or the row; plural names for a group.

One turn only, so there is no state, and no parser object either. Makes text, runs nothing.
"""

import inspect
from collections.abc import Callable
from typing import Any

from rewardsmith.errors import ConfigError
from rewardsmith.reward_config import RewardFunction
from rewardsmith.rewards.doors.asked import asked_by, asks_for_chat
from rewardsmith.rewards.doors.carry import carry, reward_text

_GROUP = {"prompts", "completions", "answers", "infos", "tasks", "states"}
_REFUSED = {
    "state": "there is one turn and no state; ask for prompt, completion, answer, info or a column by name",
    "states": "there is one turn and no state; ask for prompts, completions, answers or infos by name",
    "parser": "an object cannot travel; write what it does inside the function",
}
_GIVEN = {
    "prompt": "prompt",
    "completion": "completion",
    "answer": "example.get('answer', '')",
    "info": "_info()",
    "task": "example.get('task', '')",
}
_INFO = """\
def _info():
    import json

    info = example.get("info") or {}
    return json.loads(info) if isinstance(info, str) else info
"""


def from_verifiers(function: Callable[..., Any], *, chat: bool | None = None, **settings: Any) -> RewardFunction:
    """A RewardFunction that gives `function`, plain or async, the arguments that it names.

    They are prompt, completion, answer, info, task, and columns of the row; all of them for **kwargs. Plural names or a
    list as the annotated result make it a function of the whole group. `chat`: prompts and completions are lists of
    messages. `settings` are those of RewardFunction, `weight=0.0` for a metric. Raises RewardSourceError or
    ConfigError, naming what cannot be carried over.
    """
    text, asked = carry(function), asked_by(function)
    asked.refuse(text, _REFUSED)
    name, is_group = asked.function, _is_of_group(function)
    given = dict(_GIVEN)
    if asks_for_chat(text, chat, name):
        given["prompt"] = "[{'role': 'user', 'content': prompt}]"
        given["completion"] = "[{'role': 'assistant', 'content': completion}]"
    if is_group:
        given = {f"{key}s": f"[{value} for completion in completions]" for key, value in given.items()}
    wanted = [key for key in given if key in asked.parameters or asked.rest]
    lines = [f"_given = {{{', '.join(f'{key!r}: {given[key]}' for key in wanted)}}}"]
    columns = [key for key in asked.parameters if key not in given]
    required = [key for key in columns if asked.required(key)]
    if is_group and required:
        raise ConfigError(f"`{name}` asks for {required[0]!r}, but a function of a group gets {', '.join(given)}")
    if not is_group:
        optional = [key for key in columns if key not in required]
        some = "example.keys() - _given.keys()" if asked.rest else f"example.keys() & {set(optional) or '()'}"
        lines += [f"for _column in {some}:", "    _given[_column] = example[_column]"] if asked.rest or optional else []
        lines += [f"for _column in {required}:", "    _given[_column] = example[_column]"] if required else []
    waits = inspect.iscoroutinefunction(function)
    lines += [f"return {'await ' if waits else ''}{name}(**_given)"]
    parts = [text, *([_INFO] if {"info", "infos"} & set(wanted) else []), "\n".join(lines) + "\n"]
    source = reward_text(f"`{name}`, written for verifiers.", parts, is_async=waits, of_group=is_group)
    return RewardFunction.from_source(source, **{**({"per": "group"} if is_group else {}), **settings})


def _is_of_group(function: Callable[..., Any]) -> bool:
    signature = inspect.signature(function)
    result = signature.return_annotation
    shown = result if isinstance(result, str) else getattr(result, "__name__", "")
    return bool(_GROUP & signature.parameters.keys()) or shown.lower().startswith("list")
