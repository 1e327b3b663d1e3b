"""Reward functions as verl takes them: `compute_score(data_source, solution_str, ground_truth, extra_info=None, ...)`.

Also the plural form of its batch manager, called with lists of one. Makes text, runs nothing.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rewardsmith.errors import ConfigError
from rewardsmith.reward_config import RewardFunction
from rewardsmith.rewards.doors.asked import asked_by
from rewardsmith.rewards.doors.carry import carry, reward_text
from rewardsmith.rewards.library.settings import as_text

_GIVEN = {
    "data_source": "example.get('data_source', '')",
    "solution_str": "completion",
    "ground_truth": "_reference()",
    "extra_info": "_read(example.get('extra_info')) or {}",
}
# verl nests columns; in a CSV file such a column is JSON text.
_ROW = """\
def _read(value):
    import json

    return json.loads(value) if isinstance(value, str) and value[:1] == "{{" else value

def _reference():
    row = _read(example.get("reward_model"))
    if isinstance(row, dict):
        return row["ground_truth"]
    if {column} not in example:
        raise ValueError("the row has neither reward_model nor the column " + {column})
    return example[{column}]
"""
_SCORE = """\
if isinstance(_result, dict):
    import json

    _more = {key: value for key, value in _result.items() if key != "score"}
    if _more:
        print(json.dumps(_more, default=str))
    return _result["score"]
return _result
"""


def from_verl(
    function: Callable[..., Any],
    *,
    reward_kwargs: Mapping[str, Any] | None = None,
    column: str = "ground_truth",
    **settings: Any,
) -> RewardFunction:
    """A RewardFunction that calls `function` with the row's data source, reference and extra info, plain or async.

    The reference is `reward_model["ground_truth"]` of the row, or else its column `column`. `reward_kwargs` are plain
    values, given to each call. Of a dict the key `score` is the reward; the others are printed to the reward log as one
    line of JSON. `settings` are those of RewardFunction. Raises RewardSourceError or ConfigError, naming what cannot be
    carried over.
    """
    text, asked = carry(function), asked_by(function)
    name, fixed = asked.function, dict(reward_kwargs or {})
    plural = "solution_strs" in asked.parameters
    given = {f"{key}s": f"[{value}]" for key, value in _GIVEN.items()} if plural else _GIVEN
    arguments = [f"{key}={value}" for key, value in given.items() if key in asked.parameters or asked.rest]
    for key, value in fixed.items():
        if key in given or not (key in asked.parameters or asked.rest):
            raise ConfigError(
                f"`{name}` cannot take {key!r} from reward_kwargs; it asks for {', '.join(asked.parameters)}"
            )
        arguments.append(f"{key}={as_text(value, f'reward_kwargs[{key!r}]')}")
    if missing := [key for key in asked.parameters if asked.required(key) and key not in {**given, **fixed}]:
        key = missing[0]
        raise ConfigError(f"`{name}` asks for {key!r}, which verl does not give; say reward_kwargs={{{key!r}: ...}}")
    waits = inspect.iscoroutinefunction(function)
    call = f"{'await ' if waits else ''}{name}({', '.join(arguments)})"
    call = f"_result = {f'({call})[0]' if plural else call}\n"
    parts = [text, _ROW.format(column=repr(column)), call + _SCORE]
    return RewardFunction.from_source(reward_text(f"`{name}`, written for verl.", parts, is_async=waits), **settings)
