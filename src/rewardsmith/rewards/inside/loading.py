"""Makes functions of sources, with their imports done, so that no call has to pay for them.

Run once, in the zygote, when it is hardened. Standard library only and no import of the package.
"""

import ast
import io
import linecache
from collections.abc import Callable
from typing import Any, NamedTuple


class Function(NamedTuple):
    """A reward function ready to be called. `forked`: each call gets a process of its own."""

    call: Callable[..., Any]
    is_async: bool
    forked: bool


def load(name: str, source: str, forked: bool) -> Function:
    is_async = isinstance(ast.parse(source).body[0], ast.AsyncFunctionDef)
    return Function(load_function(source, f"<reward function {name}>"), is_async, forked)


def load_function(source: str, filename: str) -> Callable[..., Any]:
    """The function of `source`, in a namespace of its own.

    An import that the function is sure to reach must succeed; others are tried. As in `source.compile_function`, the
    annotations of the signature are dropped.
    """
    linecache.cache[filename] = (len(source), None, io.StringIO(source).readlines(), filename)
    tree = ast.parse(source)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    for node in ast.walk(definition):
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(compile(ast.Module([node], []), filename, "exec"), {})
            except BaseException:
                if node in definition.body:
                    raise
    namespace: dict[str, Any] = {"__name__": "reward_function"}
    exec(compile(tree, filename, "exec"), namespace)
    function: Callable[..., Any] = namespace[definition.name]
    return function
