"""Reward functions as TRL takes them: a whole batch by keyword, every column a list, None for no opinion.

The function is called with lists of one, or once for all completions of a prompt. Makes text, runs nothing.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from rewardsmith.reward_config import RewardFunction
from rewardsmith.rewards.doors.asked import asked_by, asks_for_chat
from rewardsmith.rewards.doors.carry import carry, reward_text

_REFUSED = {
    "trainer_state": "a reward is not told the step; give it a weight by step, RewardFunction(schedule={...})",
    "completion_ids": "a reward sees the text, not the tokens; measure the text, len(completion.split()) for one",
    "prompt_ids": "a reward sees the text, not the tokens",
    "environments": "there is one turn and no environment",
}
_LOG_EXTRA = """\
def log_extra(column, values):
    print(f"{column}: {', '.join(map(str, values))}")
"""
_LOG_METRIC = """\
def log_metric(name, value):
    print(f"{name}: {value}")
"""
_TEXTS = {"prompts": "[prompt] * len(completions)", "completions": "completions"}
_MESSAGES = {
    "prompts": "[[{'role': 'user', 'content': prompt}]] * len(completions)",
    "completions": "[[{'role': 'assistant', 'content': text}] for text in completions]",
}


def from_trl(
    function: Callable[..., Any],
    *,
    chat: bool | None = None,
    per: Literal["completion", "group"] = "completion",
    **settings: Any,
) -> RewardFunction:
    """A RewardFunction that calls `function(prompts=..., completions=..., <columns>=...)`, plain or async.

    `chat`: prompts and completions are lists of messages, as TRL gives them for conversations. `per="group"`: one call
    with all completions of a prompt, for functions that compare them; else lists of one. None stands for "no opinion"
    and leaves the completion out. What it hands to `log_extra` and `log_metric` is printed to the reward log.
    `settings` are those of RewardFunction. Raises RewardSourceError or ConfigError, naming what cannot be carried over.
    """
    text, asked = carry(function), asked_by(function)
    asked.refuse(text, _REFUSED)
    name, is_group = asked.function, per == "group"
    given = _MESSAGES if asks_for_chat(text, chat, name) else _TEXTS
    given = {**given, "log_extra": "log_extra", "log_metric": "log_metric"}
    wanted = [key for key in given if key in asked.parameters or asked.rest]
    columns = [key for key in asked.parameters if key not in given]
    lines = [] if is_group else ["completions = [completion]"]
    lines += [f"_given = {{{', '.join(f'{key!r}: {given[key]}' for key in wanted)}}}"]
    one_for_each = "_given[_column] = [example[_column]] * len(completions)"
    if asked.rest:
        lines += ["for _column in example.keys() - {'prompt', 'completion', *_given}:", f"    {one_for_each}"]
    elif optional := [key for key in columns if not asked.required(key)]:
        lines += [f"for _column in example.keys() & {{{', '.join(map(repr, optional))}}}:", f"    {one_for_each}"]
    if required := [key for key in columns if asked.required(key)]:
        lines += [f"for _column in {required!r}:", f"    {one_for_each}"]
    waits = inspect.iscoroutinefunction(function)
    lines += [
        f"_result = list({'await ' if waits else ''}{name}(**_given))",
        "if len(_result) != len(completions):",
        f"    raise ValueError(f'`{name}` gave {{len(_result)}} scores for {{len(completions)}} completions')",
        "return _result" if is_group else "return _result[0]",
    ]
    parts = [text]
    parts += [_LOG_EXTRA] if "log_extra" in wanted else []
    parts += [_LOG_METRIC] if "log_metric" in wanted else []
    about = f"`{name}`, written for TRL: it takes a batch, here {'one group' if is_group else 'of one'}."
    source = reward_text(about, [*parts, "\n".join(lines) + "\n"], is_async=waits, of_group=is_group)
    settings = {"none": "abstain", **({"per": "group"} if is_group else {}), **settings}
    return RewardFunction.from_source(source, **settings)
