"""Reward functions as text: taking a function's source, and judging whether that text can stand alone.

Only the text of the one `def` travels to the process that runs it. So `source_of` refuses what text cannot carry,
and `check` lists everything in a text that would go wrong later, each with its line and the fix. Free names are read
from the byte code, which knows scopes exactly. Annotations of the function's own signature are dropped before
compiling: they may name things that stay behind. Standard library only; nothing is run but by `compile_function`.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import dis
import functools
import inspect
import io
import linecache
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, NamedTuple

MAX_SOURCE_BYTES = 256 * 1024
Per = Literal["completion", "group"]
PARAMETERS = "(prompt, completion, example)"
GROUP_PARAMETERS = "(prompt, completions, example)"
_BATCH_PARAMETERS = {"prompts", "completions"}

# Interactive prompts put names of their own among the builtins; a worker has none of them.
_BUILTINS = set(dir(builtins)) - {"_", "display", "get_ipython", "__IPYTHON__"}
# Names that the compiler reads in class bodies, and those that every namespace has, the worker's too.
_IMPLICIT = {"__annotations__", "__conditional_annotations__", "__builtins__", "__name__"}
_MISSING = object()
_STRING_TOKENS = {"STRING", "FSTRING_MIDDLE", "TSTRING_MIDDLE"}


class SourceError(ValueError):
    """A function that cannot travel as text. Its message says why and what to do."""


class Problem(NamedTuple):
    """One thing wrong with a source text. `line` counts from 1 at the text's first line."""

    line: int
    message: str
    fix: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}; {self.fix}"


def source_of(function: Callable[..., Any], per: Per = "completion") -> str:
    """The text of a plain function, moved to the left margin. Raises SourceError if that text cannot stand alone."""
    text = text_of(function)
    problems = _problems(text, surroundings(function), per)
    if problems:
        raise SourceError("\n".join(str(problem) for problem in problems))
    return text


def text_of(function: Callable[..., Any]) -> str:
    """The text of a plain function as it stands in its file, moved to the left margin, whatever it needs from outside.

    Raises SourceError if it is no plain function or its text is not there.
    """
    plain = _plain(function)
    name = plain.__code__.co_name
    try:
        text = _dedented(inspect.getsource(plain))
        found = getattr(ast.parse(text).body[0], "name", None)
    except (OSError, SyntaxError, tokenize.TokenError):
        raise SourceError(
            f"the source of {name!r} cannot be read: it was typed at a prompt or made by exec, or its file has "
            "changed; put it into a file and import it, or use RewardFunction.from_source(text)"
        ) from None
    if found != name:
        raise SourceError(f"the file of {name!r} has changed since it was imported; import it again")
    return text


def free_names(text: str, around: Mapping[str, object]) -> dict[str, int]:
    """The names that `text` reads and does not bind, with the line of their first reading.

    A builtin is one only where `around`, as `surroundings` gives it, has another thing by that name.
    """
    names: dict[str, int] = {}
    for name, line in _unbound_names(_compiled(ast.parse(text), "<reward function>")):
        if name in around or name not in _BUILTINS:
            names.setdefault(name, line)
    return names


def check(text: str, per: Per = "completion") -> list[Problem]:
    """Everything that keeps `text` from being one reward function that stands alone, in the order of its lines.

    With `per="group"` it takes all completions of a prompt.
    """
    return _problems(text, {}, per)


def compile_function(text: str, filename: str, per: Per = "completion") -> Callable[..., Any]:
    """Run `text` in a fresh namespace and return its function. Tracebacks show its lines under `filename`.

    Raises SourceError when `check` finds a problem. The text runs with all rights of this process.
    """
    problems = check(text, per)
    if problems:
        raise SourceError("\n".join(str(problem) for problem in problems))
    linecache.cache[filename] = (len(text), None, io.StringIO(text).readlines(), filename)
    namespace: dict[str, Any] = {"__name__": "reward_function"}
    tree = ast.parse(text)
    exec(_compiled(tree, filename), namespace)
    function: Callable[..., Any] = namespace[tree.body[0].name]  # type: ignore[attr-defined]
    return function


# ---- taking the text ------------------------------------------------------------------------------------------------


def _plain(function: object) -> FunctionType:
    name = getattr(function, "__name__", None) or type(function).__name__
    write = f"write a plain `def {name if str(name).isidentifier() else 'reward'}{PARAMETERS}`"
    if isinstance(function, functools.partial):
        raise SourceError(f"a functools.partial has no text of its own; {write} with the fixed values inside")
    if isinstance(function, MethodType):
        raise SourceError(f"{name!r} is a method and needs its object; {write}")
    if hasattr(function, "__wrapped__"):
        raise SourceError(
            f"{name!r} is wrapped by a decorator, and only the text of the function inside would travel; "
            "do the decorator's work inside the function"
        )
    if not isinstance(function, FunctionType):
        kind = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise SourceError(f"{name!r} is {kind}, not a plain function; {write}")
    if function.__code__.co_name == "<lambda>":
        line = function.__code__.co_firstlineno
        raise SourceError(f"line {line} of its file: a lambda has no text of its own; write a `def` with a name")
    return function


def rows_inside_strings(text: str) -> set[int]:
    """The lines, counted from 1, that begin inside a string and belong to it."""
    rows: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] in _STRING_TOKENS:
            rows.update(range(token.start[0] + 1, token.end[0] + 1))
    return rows


def _dedented(text: str) -> str:
    """`text` without the margin of its first line. Lines that begin inside a string stay."""
    margin = text[: len(text) - len(text.lstrip())]
    if not margin:
        return text
    inside_string = {row - 1 for row in rows_inside_strings(f"if 1:\n{text}")}
    rows = enumerate(io.StringIO(text), 1)
    return "".join(line if row in inside_string else line.removeprefix(margin) for row, line in rows)


def surroundings(function: Callable[..., Any]) -> dict[str, object]:
    """What names mean around the function, other than the builtins do: none of it travels."""
    function = _plain(function)
    found = {
        name: value
        for name, value in function.__globals__.items()
        if name not in _IMPLICIT and value is not getattr(builtins, name, _MISSING)
    }
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            found[name] = None
    return found


def _fix_for(name: str, value: object) -> str:
    """How to have `name` inside, knowing what it is outside."""
    if isinstance(value, ModuleType):
        alias = "" if value.__name__ == name else f" as {name}"
        return f"write `import {value.__name__}{alias}` inside it"
    home, original = str(getattr(value, "__module__", "")), getattr(value, "__name__", name)
    of_library = home.partition(".")[0] in sys.stdlib_module_names
    if of_library and getattr(sys.modules.get(home), original, None) is value:
        alias = "" if original == name else f" as {name}"
        return f"write `from {home} import {original}{alias}` inside it"
    if callable(value):
        return f"define `{name}` inside it"
    return f"give `{name}` its value inside it, or take it from `example`"


# ---- judging the text -----------------------------------------------------------------------------------------------


def _problems(text: str, surroundings: Mapping[str, object], per: Per) -> list[Problem]:
    if len(text.encode(errors="replace")) > MAX_SOURCE_BYTES:
        return [
            Problem(1, f"the source is longer than {MAX_SOURCE_BYTES // 1024} kB", "keep data in the dataset's rows")
        ]
    try:
        tree = ast.parse(text)
        code = _compiled(tree, "<reward function>")
    except SyntaxError as error:
        return [_syntax_problem(error)]
    except (ValueError, RecursionError, MemoryError) as error:
        return [Problem(1, f"this is not source text that Python can read ({error})", "send plain, less nested text")]
    functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    if not functions:
        return [Problem(1, "there is no function", f"write one, `def reward{PARAMETERS}`")]
    problems = [
        *_problems_of_place(tree, functions[0]),
        *_problems_of_signature(functions[0], per),
        *_problems_of_kind(functions[0], code),
        *_problems_of_names(code, surroundings),
    ]
    return sorted(problems, key=lambda problem: problem.line)


def _compiled(tree: ast.Module, filename: str) -> CodeType:
    """Code of the module without the annotations of its top-level signatures, which this removes from the tree."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
    return compile(tree, filename, "exec", dont_inherit=True)


def _syntax_problem(error: SyntaxError) -> Problem:
    where = f" in `{error.text.strip()}`" if error.text and error.text.strip() else ""
    if isinstance(error, IndentationError) and "unexpected indent" in error.msg and error.lineno == 1:
        return Problem(1, "the function is indented", "move its text to the left margin")
    return Problem(error.lineno or 1, f"syntax error, {error.msg}{where}", "correct this line")


def _problems_of_place(tree: ast.Module, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Problem]:
    """Statements beside the function: only the function itself is run."""
    for node in tree.body:
        if node is function:
            continue
        shown = ast.unparse(node).splitlines()[0][:60]
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            yield Problem(node.lineno, f"`{shown}` has no effect here", "remove it")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            message = f"`{node.name}` is a second function beside `{function.name}`"
            yield Problem(node.lineno, message, "move helper functions inside the reward function")
        else:
            yield Problem(node.lineno, f"`{shown}` stands outside the function", f"move it inside `{function.name}`")
    for decorator in function.decorator_list:
        if not (isinstance(decorator, ast.Name) and decorator.id == "staticmethod"):
            message = f"the decorator `@{ast.unparse(decorator)[:60]}` does not travel with the function"
            yield Problem(decorator.lineno, message, "remove it and do its work inside the function")


def _problems_of_signature(function: ast.FunctionDef | ast.AsyncFunctionDef, per: Per) -> Iterator[Problem]:
    given, wanted = function.args, GROUP_PARAMETERS if per == "group" else PARAMETERS
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    shown, fix = f"`{function.name}({ast.unparse(given)})`", f"write `def {function.name}{wanted}`"
    if per == "completion" and names == _names(GROUP_PARAMETERS):
        message = f"{shown} takes all completions of a prompt, but one call scores one completion"
        yield Problem(function.lineno, message, f"{fix}, or give it as RewardFunction with per='group'")
    elif (_BATCH_PARAMETERS - {*_names(wanted)}) & {*names, *(a.arg for a in given.kwonlyargs)}:
        one = "the completions of one prompt" if per == "group" else "one completion"
        yield Problem(function.lineno, f"{shown} takes whole batches, but one call scores {one}", fix)
    elif len(names) != 3 or given.vararg or None in given.kw_defaults or given.kwarg:
        yield Problem(function.lineno, f"{shown} does not have exactly three parameters", fix)
    elif names != _names(wanted) and set(names) == {*_names(wanted)}:
        yield Problem(function.lineno, f"{shown} has its parameters in another order than they are given", fix)
    elif per == "group" and names[1] == "completion":
        yield Problem(function.lineno, f"{shown} takes one completion, but per='group' gives it all of a prompt", fix)


def _names(parameters: str) -> list[str]:
    return parameters.strip("()").split(", ")


def _problems_of_kind(function: ast.FunctionDef | ast.AsyncFunctionDef, code: CodeType) -> Iterator[Problem]:
    own = next(part for part in _parts(code) if part.co_name == function.name)
    if own.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        lines = (_line(step, own) for step in dis.get_instructions(own) if step.opname == "YIELD_VALUE")
        yield Problem(
            next(lines, function.lineno),
            "`yield` makes the function a generator, which is not a number",
            "use `return`",
        )


def _problems_of_names(code: CodeType, surroundings: Mapping[str, object]) -> Iterator[Problem]:
    known = _BUILTINS | {name for part in _parts(code) for name in (*part.co_varnames, *part.co_cellvars)}
    seen = set()
    for name, line in _unbound_names(code):
        if name in seen or (name in _BUILTINS and name not in surroundings):
            continue
        seen.add(name)
        if name in surroundings:
            yield Problem(line, f"`{name}` comes from outside the function", _fix_for(name, surroundings[name]))
            continue
        near = difflib.get_close_matches(name, known - {name}, n=1, cutoff=0.75)
        fix = f"did you mean `{near[0]}`? Else import or define it inside" if near else "import or define it inside"
        if name in sys.stdlib_module_names:
            fix = f"write `import {name}` inside it"
        yield Problem(line, f"`{name}` is not defined inside the function", fix)


def _unbound_names(code: CodeType) -> Iterator[tuple[str, int]]:
    """(name, line) of each reading of a name that nothing in the text binds, builtins included."""
    steps_of = {part: list(dis.get_instructions(part)) for part in _parts(code)}
    bound_globally = {step.argval for steps in steps_of.values() for step in steps if step.opname == "STORE_GLOBAL"}
    bound_globally |= {step.argval for step in steps_of[code] if step.opname == "STORE_NAME"} | _IMPLICIT
    for part, steps in steps_of.items():
        bound = bound_globally | {step.argval for step in steps if step.opname == "STORE_NAME"}
        for step in steps:
            reads = step.opname.startswith("LOAD") and ("GLOBAL" in step.opname or "NAME" in step.opname)
            if reads and step.argval not in bound:
                yield step.argval, _line(step, part)


def _parts(code: CodeType) -> Iterator[CodeType]:
    """The code and all code inside it: functions, classes, comprehensions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


def _line(step: dis.Instruction, code: CodeType) -> int:
    return (step.positions and step.positions.lineno) or code.co_firstlineno
