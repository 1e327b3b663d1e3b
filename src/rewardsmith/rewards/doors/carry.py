"""The text of functions together with what they lean on, so that it can stand inside one reward function.

Functions for other trainers live in modules, with imports, constants and helper functions around them. `carry` collects
those that a function needs: imports of installed modules, plain values, compiled patterns, loggers, and functions and
classes of the user's own files. Anything else is refused by name. `reward_text` puts it all into one `def reward`.
The objects are looked at, never called.
"""

import ast
import builtins
import importlib.util
import inspect
import io
import logging
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from rewardsmith.errors import ConfigError, RewardSourceError
from rewardsmith.rewards import source
from rewardsmith.rewards.library.settings import as_text

# Names of the function around and of what a door writes into it.
TAKEN = {
    "prompt", "completion", "completions", "example", "log_extra", "log_metric",
    "_given", "_column", "_result", "_more", "_read", "_reference", "_info", "_re", "_logging",
}  # fmt: skip


def carry(*functions: Callable[..., Any]) -> str:
    """Definitions, at the left margin, that make `functions` again.

    Raises RewardSourceError, naming what cannot come along.
    """
    parcel = _Parcel()
    for function in functions:
        try:
            definition: Any = ast.parse(source.text_of(function)).body[0]
        except source.SourceError as error:
            raise RewardSourceError(str(error)) from None
        name = name_of(function)
        for decorator in definition.decorator_list:
            parcel.problems.append(f"the decorator `@{ast.unparse(decorator)}` of `{name}` does not travel; remove it")
        parcel.need(name, function, f"`{name}`")
    if parcel.problems:
        raise RewardSourceError("\n".join(dict.fromkeys(parcel.problems)))
    return "\n".join(parcel.pieces)


def name_of(function: Callable[..., Any]) -> str:
    """The name in the function's text."""
    return str(function.__code__.co_name)


def reward_text(about: str, parts: list[str], *, is_async: bool = False, of_group: bool = False) -> str:
    """One reward function with `about` as its docstring and `parts`, texts at the left margin, as its body.

    It takes `completions`, a list, in the place of `completion` if it is `of_group`.
    """
    answers = "completions" if of_group else "completion"
    head = f"{'async ' if is_async else ''}def reward(prompt, {answers}, example):\n"
    return head + "\n".join(indented(part) for part in [f'"""{about}"""\n', *parts])


def indented(text: str) -> str:
    """`text` four places to the right, but for lines that begin inside a string."""
    inside_string = source.rows_inside_strings(text)
    rows = enumerate(io.StringIO(text), 1)
    return "".join(line if row in inside_string or not line.strip() else f"    {line}" for row, line in rows)


class _Parcel:
    """What has been collected so far: `pieces` of text in an order in which they can run, `problems` in plain words."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.problems: list[str] = []
        self._values: dict[str, object] = {}
        self._seen: set[str] = set()

    def need(self, name: str, value: object, where: str, text: str | None = None) -> None:
        """Have `name` mean `value`. `where` it is needed is for the problems.

        `text` is the one that needs it; without one, `value` is a function whose own text is to travel in any case.
        """
        if self._values.setdefault(name, value) is not value:
            self.problems.append(f"{where}: `{name}` has two meanings in what would travel; rename one of them")
            return
        if name in self._seen and not isinstance(value, ModuleType):
            return
        self._seen.add(name)
        if name in TAKEN or name.startswith("__"):
            self.problems.append(f"{where}: the name `{name}` is taken in a reward function; rename yours")
            return
        try:
            piece = self._definition(name, value) if text is None else self._piece(name, value, where, text)
        except (ConfigError, source.SourceError) as error:
            self.problems.append(f"{where}: {error}")
        else:
            self.pieces += [piece] if piece not in self.pieces else []

    def _piece(self, name: str, value: object, where: str, text: str) -> str:
        """The definition of `name`, after the pieces it needs. Raises ConfigError or SourceError if there is none."""
        if isinstance(value, ModuleType):
            if not _installed(value.__name__):
                raise ConfigError(
                    f"the module `{value.__name__}` is a file of yours; import what is needed from it by name"
                )
            return _imports(name, value, text)
        home, original = str(getattr(value, "__module__", "")), str(getattr(value, "__name__", ""))
        if _installed(home) and getattr(sys.modules.get(home), original, None) is value:
            return f"from {home} import {original}{'' if original == name else f' as {name}'}\n"
        if isinstance(value, re.Pattern):
            return f"import re as _re\n{name} = _re.compile({value.pattern!r}, {value.flags})\n"
        if isinstance(value, logging.Logger):
            return f"import logging as _logging\n{name} = _logging.getLogger({value.name!r})\n"
        inner = inspect.unwrap(value) if callable(value) else value
        if not isinstance(inner, FunctionType | type):
            return f"{name} = {as_text(value, f'`{name}`')}\n"
        if inner.__name__ != name:
            self.need(inner.__name__, value, where, text)
            return f"{name} = {inner.__name__}\n"
        return self._definition(name, inner)

    def _definition(self, name: str, value: Any) -> str:
        """The text of a function or class of the user's, after the pieces it needs."""
        around: dict[str, object]
        if isinstance(value, FunctionType):
            text, around = source.text_of(value), source.surroundings(value)
        else:
            try:
                text = textwrap.dedent(inspect.getsource(value))
            except (OSError, TypeError):
                raise ConfigError(f"the source of the class `{name}` cannot be read; put it into a file") from None
            around = {
                key: thing
                for key, thing in vars(sys.modules[value.__module__]).items()
                if thing is not getattr(builtins, key, None)
            }
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Global):
                raise ConfigError(f"`{name}` changes the global `{node.names[0]}`, which no other call would see")
            for module in _imported(node):
                if _is_own(module):
                    raise ConfigError(
                        f"`{name}` imports `{module}`, a file of yours; import it beside the function instead"
                    )
        try:
            names = source.free_names(text, around)
        except SyntaxError:
            raise ConfigError(
                f"`{name}` changes a variable of the function around it; no other call would see it"
            ) from None
        for wanted, line in names.items():
            where = f"line {line} of `{name}`"
            if wanted in around:
                self.need(wanted, around[wanted], where, text)
            else:
                self.problems.append(f"{where}: `{wanted}` is not defined")
        return _unannotated(text) if isinstance(value, FunctionType) else text


def _installed(name: str) -> bool:
    """Whether a module comes with Python or with a package, and is no file of the user's own."""
    top = name.partition(".")[0]
    return top in sys.stdlib_module_names or (top in sys.modules and not _is_own(top))


def _is_own(name: str) -> bool:
    """Whether a module is here, but comes with nothing that could be installed where rewards run."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top) if top else None
    except ValueError:  # a module without one, such as __main__
        return True
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
    packages = {"site-packages", "dist-packages"}
    # Rewards run without this package: what they take from it goes along as text.
    return (
        not top
        or top == "rewardsmith"
        or (bool(places) and not any(packages & set(Path(str(p)).parts) for p in places))
    )


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return ["" if node.level else str(node.module)] if isinstance(node, ast.ImportFrom) else []


def _imports(name: str, module: ModuleType, text: str) -> str:
    """The import that binds `name`, and those of the module's submodules that `text` reaches through it."""
    found = [f"import {module.__name__}{'' if module.__name__ == name else f' as {name}'}\n"]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            inner = module.__name__ + dotted.removeprefix(name)
            if dotted.startswith(f"{name}.") and isinstance(sys.modules.get(inner), ModuleType):
                found.append(f"import {inner}\n")
    return "".join(dict.fromkeys(found))


def _unannotated(text: str) -> str:
    """The text of a function with a plain signature: nested, it would look up annotations, which may stay behind."""
    (node,) = ast.parse(text).body
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    first = node.body[0]
    row = min([first.lineno, *(decorator.lineno for decorator in getattr(first, "decorator_list", []))])
    lines = io.StringIO(text).readlines()
    before, body = lines[: node.lineno - 1], lines[row - 1 :]
    margin = body[0].encode()[: first.col_offset].decode()
    one_line = row == first.lineno and bool(margin.strip())
    if one_line:
        body[0] = "    " + body[0].removeprefix(margin)
    node.returns, node.decorator_list, node.body = None, [], [ast.Pass()]
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    head = ast.unparse(node).removesuffix("pass").rstrip() + "\n"
    return "".join([*before, head, *body])
