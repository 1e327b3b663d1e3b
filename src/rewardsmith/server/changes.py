"""From a change of a running job's reward functions, as it is sent, to what becomes the job's next revision.

It comes in three forms: the whole config anew (`of_config`, as the stock SDK sends it), by name (`of_change`), or as
the number of an earlier revision (`of_revision`). Each gives the set that is wanted; `checked` makes it fit to be used.
Nothing is stored here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rewardsmith import wire
from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ConfigError, Conflict
from rewardsmith.reward_config import RewardFunction, RewardFunctionsConfig, RewardFunctionsRuntimeConfig
from rewardsmith.server.submission import Change, checked_functions
from rewardsmith.store import Store


def of_config(job: wire.Job, sent: dict[str, Any], secrets: Mapping[str, str]) -> RewardFunctionsConfig:
    """The reward functions of a whole config; those of the job where it has none.

    A field that is missing or None in `sent` keeps its value, and so do settings of a function that keeps its name.
    `secrets` are the job's: its stored config has only their names.
    Raises ConfigError naming every other field that differs.
    """
    stored, change = GRPOConfig(**job.params), GRPOConfig(**sent)
    if change.secrets:
        same = {name for name, value in change.secrets.items() if secrets.get(name) == value}
        change.secrets = {n: stored.secrets[n] if n in same else value for n, value in change.secrets.items()}
    before = stored.model_dump(mode="json")
    differing = sorted(_differences(change.model_dump(mode="json", exclude_unset=True, exclude={"reward_fns"}), before))
    if differing:
        raise ConfigError(
            f"only reward_fns can change while a job runs; these differ from its config: {', '.join(differing)}. "
            "Start a new job for them, with continue_from_version to go on from here"
        )
    present, wanted = stored.reward_fns, change.reward_fns
    if "reward_fns" not in change.model_fields_set:
        return present
    return RewardFunctionsConfig(
        functions={
            name: _inheriting(function, present.functions.get(name)) for name, function in wanted.functions.items()
        },
        runtime=_runtime(present.runtime, wanted.runtime.model_dump(exclude_unset=True)),
    )


def of_change(job: wire.Job, change: wire.RevisionChange) -> RewardFunctionsConfig:
    """The job's functions after a change by name. Raises ConfigError for names that there are not."""
    present = GRPOConfig(**job.params).reward_fns
    given = RewardFunctionsConfig(functions=change.functions).functions
    functions = dict(present.functions)
    for name in change.remove:
        if name in given:
            raise ConfigError(f"reward function {name!r} is to be removed and also given anew; do one of them")
        if name not in functions:
            raise ConfigError(f"there is no reward function {name!r} to remove; the job has {', '.join(functions)}")
        del functions[name]
    for name, function in given.items():
        functions[name] = _inheriting(function, present.functions.get(name))
    for name, weight in change.weights.items():
        if name not in functions:
            raise ConfigError(f"there is no reward function {name!r} to weigh; there are {', '.join(functions)}")
        functions[name] = _weighing(functions[name], weight)
    return RewardFunctionsConfig(functions=functions, runtime=_runtime(present.runtime, change.runtime))


def of_revision(store: Store, uuid: str, number: int) -> RewardFunctionsConfig:
    """An earlier set. Raises NotFound, or Conflict for one that was refused."""
    revision = store.runs.revision(uuid, number)
    if revision.refused is not None:
        raise Conflict(f"revision {number} was refused and never scored a step: {revision.refused}")
    return GRPOConfig(**store.runs.config_with(uuid, number)).reward_fns


def checked(job: wire.Job, wanted: RewardFunctionsConfig) -> Change | None:
    """The wanted set as it is stored, after it was loaded as the job loads it; None when the job has it already.

    Raises RewardSourceError or ConfigError with what is wrong with it.
    """
    config = GRPOConfig(**job.params)
    if wanted == config.reward_fns:
        return None
    functions = checked_functions(wanted)
    config.reward_fns = wanted
    return Change(params=config.model_dump(mode="json", by_alias=True), functions=functions)


def compared_steps(job: wire.Job) -> int:
    """For how many steps the functions that a change takes the place of are scored on, unless the user says it.

    Not at all where they may call a service: such calls take somebody's money, or the place of those that count.
    """
    runtime = job.params["rewardFns"].get("runtime") or {}
    return 0 if runtime.get("network") else wire.COMPARED_STEPS


def _inheriting(sent: RewardFunction, stored: RewardFunction | None) -> RewardFunction:
    """The function that was sent, with what it leaves unset taken from the stored one of the same name.

    The stock SDK sends sources and nothing else, also of functions that it did not touch (contract 1.6).
    """
    if stored is None:
        return sent
    given = sent.model_dump(exclude_unset=True)
    return RewardFunction(**_without_other_weight(stored.model_dump(), given), **given)


def _weighing(function: RewardFunction, weight: float | dict[int, float]) -> RewardFunction:
    given = {"schedule": weight} if isinstance(weight, dict) else {"weight": weight}
    return RewardFunction(**_without_other_weight(function.model_dump(), given), **given)


def _without_other_weight(stored: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept beside `given`: a weight that is given ends a schedule, and a schedule ends a weight."""
    ended = {"weight", "schedule"} if {"weight", "schedule"} & given.keys() else set()
    return {name: value for name, value in stored.items() if name not in given and name not in ended}


def _runtime(stored: RewardFunctionsRuntimeConfig, given: Mapping[str, Any]) -> RewardFunctionsRuntimeConfig:
    return RewardFunctionsRuntimeConfig(**{**stored.model_dump(), **given})


def _differences(sent: Mapping[str, Any], stored: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in sent.items():
        if isinstance(value, Mapping) and isinstance(stored.get(name), Mapping):
            yield from _differences(value, stored[name], f"{above}{name}.")
        elif value is not None and value != stored.get(name):
            yield above + name
