"""What one set of reward functions has that another has not: source by line, settings by name. Pure functions."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from rewardsmith import wire
from rewardsmith.reward_config import RewardFunctionsRuntimeConfig

_PLAIN = wire.RevisionFunction(name="", source="", source_sha256="").settings


def between(old: wire.Revision | None, new: wire.Revision) -> wire.RevisionDiff:
    """Without an old one everything is new."""
    runtimes = [RewardFunctionsRuntimeConfig(**revision.runtime) for revision in (old or new, new)]
    diff = difference(old.functions if old else [], new.functions, *runtimes)
    return diff.model_copy(update={"old": old and old.revision, "new": new.revision})


def difference(
    old: Sequence[wire.RevisionFunction],
    new: Sequence[wire.RevisionFunction],
    old_runtime: RewardFunctionsRuntimeConfig,
    new_runtime: RewardFunctionsRuntimeConfig,
    *,
    old_number: int | None = None,
) -> wire.RevisionDiff:
    """Functions in the order of the new set, those that it has no longer at the end."""
    before, after = ({function.name: function for function in functions} for functions in (old, new))
    names = [*after, *(name for name in before if name not in after)]
    return wire.RevisionDiff(
        old=old_number,
        functions=[_of_function(name, before.get(name), after.get(name)) for name in names],
        runtime=_settings(old_runtime.model_dump(mode="json"), new_runtime.model_dump(mode="json")),
    )


def _of_function(name: str, old: wire.RevisionFunction | None, new: wire.RevisionFunction | None) -> wire.FunctionDiff:
    lines = difflib.unified_diff(
        old.source.splitlines() if old else [],
        new.source.splitlines() if new else [],
        fromfile=name if old else "/dev/null",
        tofile=name if new else "/dev/null",
        lineterm="",
    )
    source = "".join(f"{line}\n" for line in lines)
    # Of a function that comes or goes, only the settings that somebody chose are worth telling.
    if old is None or new is None:
        chosen = [{k: v for k, v in side.settings.items() if v != _PLAIN[k]} if side else {} for side in (old, new)]
        return wire.FunctionDiff(
            name=name, change="added" if old is None else "removed", source=source, settings=_settings(*chosen)
        )
    settings = _settings(old.settings, new.settings)
    return wire.FunctionDiff(
        name=name, change="changed" if source or settings else "same", source=source, settings=settings
    )


def _settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[wire.Setting]:
    names = dict.fromkeys([*old, *new])
    return [
        wire.Setting(name=name, old=old.get(name), new=new.get(name))
        for name in names
        if old.get(name) != new.get(name)
    ]
