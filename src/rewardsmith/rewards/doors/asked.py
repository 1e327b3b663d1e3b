"""What a function written for another trainer asks for: read from its signature and its text, and refused by name.

Looks at the function and calls nothing. `carry` takes its text along, the doors write the call.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rewardsmith.errors import ConfigError
from rewardsmith.rewards.doors.carry import name_of


@dataclass(frozen=True)
class Asked:
    """What a function asks for by name: its parameters, and the name of its **kwargs if it has any."""

    function: str
    parameters: dict[str, inspect.Parameter]
    rest: str | None

    def refuse(self, text: str, fixes: Mapping[str, str]) -> None:
        """Raise ConfigError if it takes one of `fixes`, as a parameter or, by its `text`, out of **kwargs."""
        taken = {ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Subscript | ast.Call)}
        for key, fix in fixes.items():
            of_rest = {f"{self.rest}[{key!r}]", f"{self.rest}.get({key!r})", f"{self.rest}.get({key!r}, None)"}
            if key in self.parameters or taken & of_rest:
                raise ConfigError(f"`{self.function}` asks for {key!r}: {fix}")

    def required(self, key: str) -> bool:
        return self.parameters[key].default is inspect.Parameter.empty


def asked_by(function: Callable[..., Any]) -> Asked:
    """Raises ConfigError if the function takes anything by position alone."""
    found: dict[str, inspect.Parameter] = {}
    rest = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise ConfigError(f"`{name_of(function)}` takes `{parameter}` by position, but it is called by keyword")
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = parameter.name
        else:
            found[parameter.name] = parameter
    return Asked(name_of(function), found, rest)


def asks_for_chat(text: str, chat: bool | None, name: str) -> bool:
    """Whether texts are handed over as lists of messages. Raises ConfigError if nobody has said so and it matters."""
    reads = any(isinstance(node, ast.Constant) and node.value == "content" for node in ast.walk(ast.parse(text)))
    if chat is None and reads:
        raise ConfigError(
            f"`{name}` reads the 'content' of something: say chat=True if it takes prompts and completions as lists of "
            "messages, chat=False if it takes them as texts"
        )
    return bool(chat)
