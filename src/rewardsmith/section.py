"""A group of settings: unknown fields are refused with the nearest known one, None is "not set", errors are for people.

The base of the classes in `config`. Nothing here knows what the settings mean.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rewardsmith.errors import ConfigError, RewardSourceError

LONGEST_SHOWN = 100


class Section(BaseModel):
    """A group of settings. Unknown fields are refused, None means "not set", errors come as ConfigError."""

    # No inf or nan: JSON has no word for them, so they would be stored as "not set".
    model_config = ConfigDict(extra="forbid", validate_assignment=True, populate_by_name=True, allow_inf_nan=False)
    # What is often written for a field that has another name or place here.
    _MEANT: ClassVar[dict[str, str]] = {}

    def __init__(self, /, **fields: Any) -> None:
        given = {name: value for name, value in self._unfolded(fields).items() if value is not None}
        self._refuse_unknown(given)
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise _explained(type(self).__name__, error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_unknown([name])
        before, was_set = dict(self.__dict__), name in self.model_fields_set
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            # Checks of the whole section run with the new value in place; a refused change changes nothing.
            self.__dict__.update(before)
            if not was_set:
                self.model_fields_set.discard(name)
            raise _explained(type(self).__name__, error) from None

    @classmethod
    def _unfolded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return fields

    @classmethod
    def _refuse_unknown(cls, given: Iterable[str]) -> None:
        known = {*cls.model_fields, *(f.alias for f in cls.model_fields.values() if f.alias)}
        for name in given:
            if name not in known:
                near = cls._MEANT.get(name) or _nearest(name, cls._paths())
                hint = f"did you mean {near!r}?" if near else f"its fields: {', '.join(sorted(cls.model_fields))}"
                raise ConfigError(f"{cls.__name__} has no field {name!r}; {hint}")

    @classmethod
    def _paths(cls) -> dict[str, str]:
        """Where each field is reached from here, by its own name: those of the sections inside as well."""
        inner = {name: field.annotation for name, field in cls.model_fields.items()}
        paths = {
            below: f"{name}.{path}"
            for name, section in inner.items()
            if isinstance(section, type) and issubclass(section, Section)
            for below, path in section._paths().items()
        }
        return paths | {name: name for name in sorted(inner)}

    def to_wire(self) -> dict[str, Any]:
        """The fields that were set, as the HTTP API spells them (contract 1.6: snake_case but for two names)."""
        self._count_changes_inside()
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)

    def _count_changes_inside(self) -> None:
        """A section left at its default counts as set once something in it was: `config.reward_fns["f"] = f`."""
        for name in type(self).model_fields:
            if isinstance(section := getattr(self, name), Section):
                section._count_changes_inside()
                if section.model_fields_set:
                    self.model_fields_set.add(name)


def _nearest(name: str, paths: Mapping[str, str]) -> str | None:
    """The path of the field that was most likely meant.

    It has this very name in a section inside, or a name that is part of the given one, or the closest spelling.
    """
    if name in paths:
        return paths[name]
    contained = [field for field, path in paths.items() if field == path and field in name]
    close = difflib.get_close_matches(name, paths, n=1, cutoff=0.5)
    return max(contained, key=len) if contained else paths[close[0]] if close else None


def _explained(owner: str, error: ValidationError) -> ConfigError:
    """One sentence for each thing pydantic found, naming the field."""
    lines, kind = list[str](), ConfigError
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        given = repr(item["input"]) if where and isinstance(item["input"], (str, int, float, bool)) else ""
        given = f" (given: {given})" if 0 < len(given) <= LONGEST_SHOWN else ""
        # Problems of a function's text say themselves whose they are.
        of_source = isinstance(item.get("ctx", {}).get("error"), RewardSourceError)
        lines.append(text if not where or of_source or text.startswith(owner) else f"{owner}.{where}: {text}{given}")
        kind = RewardSourceError if of_source else kind
    return kind("; ".join(lines))
