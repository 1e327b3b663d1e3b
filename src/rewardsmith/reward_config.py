"""Reward functions as a config holds them: source text with a weight, and sets of them by name.

Every form that users write is taken in here: a dict, a list, one function. What is wrong with a function is said when
the object is built, with the line and the fix; the check itself is in `rewards.source`. Nothing here runs user code.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rewardsmith.errors import ConfigError, RewardSourceError
from rewardsmith.rewards import source as reward_source
from rewardsmith.section import Section

RESERVED_REWARD_NAMES = {"total_reward", "total_reward_std"}
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


class RewardFunction(Section):
    """One reward function as it travels: its source text in base64, its weight, and what its failures count.

    A `schedule`, `{step: weight}` with steps counted from 1, takes the place of a weight: in a straight line between
    two of its steps, level before the first and after the last. Two steps side by side make a jump.
    `on_error` applies to not_a_number, exception, timeout, crash, out_of_memory and output_limit: "zero" scores 0,
    "exclude" leaves the completion out of its group, "fail" ends the job. `none="abstain"` lets a function
    return None to say that it has no opinion. `per="group"` marks a function `(prompt, completions, example)` that is
    called once for each prompt, with all its completions, and returns a list with a number for each.
    """

    encoded_fn: str = Field(alias="encodedFn")
    weight: float = Field(default=1.0, allow_inf_nan=False)
    schedule: dict[Annotated[int, Field(ge=1)], float] | None = Field(default=None, min_length=1, max_length=1000)
    on_error: Literal["zero", "exclude", "fail"] = "zero"
    none: Literal["error", "abstain"] = "error"
    per: reward_source.Per = "completion"

    @field_validator("encoded_fn")
    @classmethod
    def _is_source(cls, value: str) -> str:
        try:
            base64.b64decode(value, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise ValueError("encodedFn is not base64 of UTF-8 source text") from None
        return value

    @model_validator(mode="after")
    def _weighs_in_one_way(self) -> Self:
        if self.schedule is not None and self.weight != 1.0:
            raise ValueError(
                f"RewardFunction.weight={self.weight:g} cannot act beside a schedule, which has the weight of every "
                "step: leave one of them out"
            )
        return self

    @classmethod
    def from_source(cls, text: str, **settings: Any) -> Self:
        """From source text with one top-level function. Raises RewardSourceError with lines and fixes."""
        problems = reward_source.check(text, settings.get("per", "completion"))
        if problems:
            raise RewardSourceError("\n".join(str(problem) for problem in problems))
        return cls(encoded_fn=base64.b64encode(text.encode()).decode(), **settings)

    @classmethod
    def from_callable(cls, function: Callable[..., Any], **settings: Any) -> Self:
        """From a plain function `(prompt, completion, example)`. Raises RewardSourceError with lines and fixes."""
        try:
            text = reward_source.source_of(function, settings.get("per", "completion"))
        except reward_source.SourceError as error:
            raise RewardSourceError(str(error)) from None
        return cls.from_source(text, **settings)

    @property
    def source(self) -> str:
        return base64.b64decode(self.encoded_fn).decode()

    @property
    def function(self) -> Callable[..., Any]:
        """The function made again from its source. This runs the text: only for sources you trust."""
        return reward_source.compile_function(self.source, "<reward function>", self.per)


class RewardFunctionsRuntimeConfig(Section):
    """How the functions are run. `packages` are pip requirement lines; `call_seconds` is what one call may take.

    `network` names the endpoints that functions may talk to, such as "api.example.com:443"; without any there is none.

    `mode` says how long a process is used: "warm" for thousands of calls, "chunk" for 16, "call" for one; "auto" is
    warm, but one process per call for functions that can run text of the model (exec, eval, subprocess and the like).
    `concurrency` calls of an `async def` function run at a time in each process.
    """

    packages: list[str] = Field(default_factory=list)
    network: list[str] = Field(default_factory=list, max_length=100)
    mode: Literal["auto", "warm", "chunk", "call"] = "auto"
    call_seconds: float = Field(default=5.0, gt=0, le=300)
    concurrency: int = Field(default=8, ge=1, le=256)

    @field_validator("network")
    @classmethod
    def _are_endpoints(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(map(checked_endpoint, value)))


def checked_endpoint(text: str) -> str:
    """`host:port` in the one form in which endpoints are compared. Raises ValueError with what is wrong and the fix."""
    host, _, port = text.strip().lower().rpartition(":")
    host = host.removesuffix(".")
    if "/" in text:
        raise ValueError(f"{text!r} is a URL; write the host and the port alone, such as 'api.example.com:443'")
    if "*" in text:
        raise ValueError(f"{text!r} has a wildcard; every host is named by itself")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} has no port; write host:port, such as 'api.example.com:443'")
    if host.startswith("["):
        try:
            host = f"[{ipaddress.IPv6Address(host.strip('[]'))}]"
        except ValueError:
            raise ValueError(f"{text!r}: there is no IPv6 address in the brackets") from None
    elif not _HOST.fullmatch(host):
        raise ValueError(f"{text!r}: {host!r} is no name of a host; write one in ASCII, or an IPv6 address in brackets")
    return f"{host}:{int(port)}"


def _as_reward(name: object, value: object) -> RewardFunction:
    if not isinstance(name, str) or not name or len(name) > 100 or not name.isprintable():
        raise ConfigError(f"a reward function's name is a printable text of 1 to 100 characters, not {name!r}")
    if name in RESERVED_REWARD_NAMES:
        raise ConfigError(f"{name!r} is the name of a metric; give the reward function another one")
    if isinstance(value, RewardFunction):
        return value
    if isinstance(value, Mapping):
        return RewardFunction(**value)
    if callable(value):
        try:
            return RewardFunction.from_callable(value)
        except RewardSourceError as error:
            raise RewardSourceError(f"reward function {name!r}: {error.message}") from None
    raise ConfigError(f"reward function {name!r} is a {type(value).__name__}; give a function or a RewardFunction")


def _named(functions: object) -> dict[str, object]:
    """Any accepted form of a set of functions, as name -> function in the order given."""
    if isinstance(functions, Mapping):
        return dict(functions)
    if callable(functions):
        functions = [functions]
    if not isinstance(functions, (list, tuple)):
        raise ConfigError(f"reward functions are a dict, a list or one function, not a {type(functions).__name__}")
    named: dict[str, object] = {}
    for function in functions:
        name = getattr(function, "__name__", None)
        if name is None:
            raise ConfigError(f"a {type(function).__name__} in a list has no name; give a dict, {{name: function}}")
        if name in named:
            raise ConfigError(f"two reward functions are named {name!r}; give a dict with two names")
        named[name] = function
    return named


class RewardFunctionsConfig(Section):
    """The set of reward functions, by name, in display order. `cfg["name"] = function` and `del cfg["name"]` work.

    `functions` takes a dict, a list of functions (named by `__name__`) or one function.
    """

    runtime: RewardFunctionsRuntimeConfig = Field(default_factory=RewardFunctionsRuntimeConfig)
    functions: dict[str, RewardFunction] = Field(default_factory=dict)
    _MEANT: ClassVar[dict[str, str]] = {"weight": "RewardFunction.weight"}

    @field_validator("functions", mode="before")
    @classmethod
    def _any_form(cls, value: object) -> dict[str, RewardFunction]:
        return {name: _as_reward(name, function) for name, function in _named(value).items()}

    @classmethod
    def of(cls, value: object) -> RewardFunctionsConfig:
        """From any accepted form, also a bare `{name: function}` or a list."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and (
            isinstance(value.get("functions"), (Mapping, list, tuple)) or set(value) == {"runtime"}
        ):
            return cls(**value)
        return cls(functions=value)

    def __getitem__(self, name: str) -> RewardFunction:
        return self.functions[name]

    def __setitem__(self, name: str, function: object) -> None:
        self.functions = {**self.functions, name: _as_reward(name, function)}

    def __delitem__(self, name: str) -> None:
        if name not in self.functions:
            raise KeyError(name)
        self.functions = {key: value for key, value in self.functions.items() if key != name}

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(self.functions)

    def __len__(self) -> int:
        return len(self.functions)

    def __contains__(self, name: object) -> bool:
        return name in self.functions
