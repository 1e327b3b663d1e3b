"""Taking a function's text and judging it: what is refused, with which line and fix, and what must not be."""

import ast
import functools
import importlib
import math as maths
import re
import subprocess
import sys
import textwrap
from collections import Counter as Count
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewardsmith.rewards import source
from rewardsmith.rewards.inside import loading
from rewardsmith.rewards.source import Problem, SourceError, check, compile_function, source_of

LIMIT = 3


def helper(number: float) -> float:
    return number


def max(*numbers: float) -> float:
    return 0.0


def module_level(prompt: str, completion: str, example: dict[str, Any]) -> float:
    return float(len(completion))


# ---- taking the text ------------------------------------------------------------------------------------------------


def test_plain_function() -> None:
    assert source_of(module_level).startswith("def module_level(prompt: str, completion: str, example: dict[str, Any])")
    assert compile_function(source_of(module_level), "<m>")("p", "abc", {}) == 3.0


def test_function_inside_a_function_loses_its_margin_but_not_what_its_strings_hold() -> None:
    def inner(prompt, completion, example):
        def depth(number):
            return number if number == 0 else 1 + depth(number - 1)

        text = """
            kept
        back
    """
        # a comment
        joined = f"""
            {depth(2)}
        """
        return [text, joined]

    taken = source_of(inner)
    assert taken.startswith("def inner(")
    assert compile_function(taken, "<inner>")("", "", {}) == inner("", "", {})


def test_function_of_a_class() -> None:
    class Rewards:
        @staticmethod
        def short(prompt, completion, example):
            return -len(completion)

        def method(self, completion, example):
            return 1.0

    assert compile_function(source_of(Rewards.short), "<short>")("", "abc", {}) == -3
    with pytest.raises(SourceError, match=r"'method' is a method.*def method\(prompt, completion, example\)"):
        source_of(Rewards().method)


def test_recursion_is_no_closure() -> None:
    def down(prompt, completion, example):
        return 1.0 if completion == "" else down(prompt, completion[1:], example)

    assert compile_function(source_of(down), "<down>")("", "abc", {}) == 1.0


def test_classes_inside_a_function_travel() -> None:
    def with_classes(prompt, completion, example):
        from dataclasses import dataclass
        from html.parser import HTMLParser

        @dataclass
        class Weights:
            """How much each part counts."""

            tag: float = 0.5

        class Tags(HTMLParser):
            count = 0

            def handle_starttag(self, tag, attributes):
                self.count += 1

        tags = Tags()
        tags.feed(completion)
        return Weights().tag * tags.count + (__name__ == "")

    assert loading.load_function(source_of(with_classes), "<f>")("", "<a><b>", {}) == 1.0


def refused(function: object) -> str:
    with pytest.raises(SourceError) as caught:
        source_of(function)  # type: ignore[arg-type]
    return str(caught.value)


def test_names_from_outside_are_refused_with_line_and_fix() -> None:
    weight, pattern = 2.0, re.compile("x")

    def everything(prompt, completion, example):
        first = re.findall("x", completion)
        second = maths.sqrt(4)
        third = Count(completion)
        fourth = helper(1.0)
        fifth = LIMIT
        sixth = [weight for _ in range(3) if pattern]
        return max(first, second, third, fourth, fifth, sixth)

    outside = "comes from outside the function"
    own_value = "inside it, or take it from `example`"
    assert refused(everything).splitlines() == [
        f"line 2: `re` {outside}; write `import re` inside it",
        f"line 3: `maths` {outside}; write `import math as maths` inside it",
        f"line 4: `Count` {outside}; write `from collections import Counter as Count` inside it",
        f"line 5: `helper` {outside}; define `helper` inside it",
        f"line 6: `LIMIT` {outside}; give `LIMIT` its value {own_value}",
        f"line 7: `pattern` {outside}; give `pattern` its value {own_value}",
        f"line 7: `weight` {outside}; give `weight` its value {own_value}",
        f"line 8: `max` {outside}; define `max` inside it",
    ]


def test_lambda() -> None:
    line = sys._getframe().f_lineno + 1
    message = refused(lambda prompt, completion, example: 1.0)
    assert message == f"line {line} of its file: a lambda has no text of its own; write a `def` with a name"


def test_decorated_functions() -> None:
    def twice(function: Callable[..., float]) -> Callable[..., float]:
        @functools.wraps(function)
        def wrapper(*arguments: Any) -> float:
            return 2 * function(*arguments)

        return wrapper

    def marked(function: Callable[..., float]) -> Callable[..., float]:
        return function

    def plain(prompt, completion, example):
        return 1.0

    @marked
    def with_mark(prompt, completion, example):
        return 1.0

    assert "'plain' is wrapped by a decorator" in refused(twice(plain))
    assert "'plain' is wrapped by a decorator" in refused(functools.lru_cache(plain))
    assert "line 1: the decorator `@marked` does not travel" in refused(with_mark)


class Callable_:
    def __call__(self, prompt, completion, example):
        return 1.0


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        (functools.partial(module_level, "p"), "functools.partial has no text"),
        (Callable_(), "'Callable_' is of type Callable_, not a plain function"),
        (Callable_, "'Callable_' is a class"),
        (len, "'len' is of type builtin_function_or_method"),
        (maths.fmod, "'fmod' is of type builtin_function_or_method"),
    ],
)
def test_what_is_not_a_plain_function(thing: object, says: str) -> None:
    assert says in refused(thing)


def test_without_a_file() -> None:
    namespace: dict[str, Any] = {}
    exec("def typed(prompt, completion, example): return 1.0", namespace)
    message = refused(namespace["typed"])
    assert "'typed' cannot be read" in message
    assert "put it into a file and import it, or use RewardFunction.from_source(text)" in message


def test_file_changed_since_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def {}(prompt, completion, example):\n    return 1.0\n"
    file = tmp_path / "changing_rewards.py"
    file.write_text(text.format("first") + text.format("second"))
    monkeypatch.syspath_prepend(tmp_path)
    first = importlib.import_module("changing_rewards").first
    file.write_text(text.format("other") + text.format("first") + "# longer\n")
    assert "file of 'first' has changed" in refused(first)


# ---- judging the text -----------------------------------------------------------------------------------------------

REFUSED = {
    "syntax": ("def f(a, b, c):\n    return (1\n", [(2, "syntax error", "correct this line")]),
    "indented": ("    def f(a, b, c):\n        return 1\n", [(1, "is indented", "left margin")]),
    "return outside": ("return 1", [(1, "syntax error", "")]),
    "NUL": ("def f(a, b, c): return '\0'", [(1, "null bytes", "")]),
    "lone surrogate": ("def f(a, b, c): return '\ud800'", [(1, "not source text", "")]),
    "nested too deeply": (f"def f(a, b, c): return {'(' * 5000}1{')' * 5000}", [(1, "", "")]),
    "too long": ("#" * 300_000, [(1, "longer than 256 kB", "")]),
    "empty": ("", [(1, "no function", "def reward(prompt, completion, example)")]),
    "only a lambda": ("f = lambda a, b, c: 1", [(1, "no function", "")]),
    "import outside": (
        "import re\nfrom math import pi\ndef f(a, b, c): return re.x + pi",
        [(1, "`import re` stands outside", "move it inside `f`"), (2, "`from math import pi` stands outside", "")],
    ),
    "future import": ("from __future__ import annotations\ndef f(a, b, c): return 1", [(1, "no effect", "remove it")]),
    "constant outside": ("def f(a, b, c): return K\nK = 1", [(2, "`K = 1` stands outside", "inside `f`")]),
    "class outside": ("class K:\n    x = 1\ndef f(a, b, c): return K.x", [(1, "`class K:` stands outside", "")]),
    "helper outside": (
        "def f(a, b, c): return g()\ndef g(): return 1",
        [(2, "`g` is a second function beside `f`", "move helper functions inside")],
    ),
    "decorator": ("@cache\ndef f(a, b, c): return 1", [(1, "`@cache` does not travel", ""), (1, "`cache` is not", "")]),
    "two parameters": (
        "def f(a, b): return 1",
        [(1, "`f(a, b)` does not have exactly three", "write `def f(prompt, co")],
    ),
    "four parameters": ("def f(a, b, c, d=1): return 1", [(1, "`f(a, b, c, d=1)` does not have", "")]),
    "star": ("def f(*a): return 1", [(1, "`f(*a)` does not have", "")]),
    "keywords": ("def f(a, b, c, **k): return 1", [(1, "`f(a, b, c, **k)`", "")]),
    "keyword only": ("def f(a, b, c, *, d): return 1", [(1, "does not have", "")]),
    "swapped": (
        "def f(completion, prompt, example): return 1",
        [(1, "`f(completion, prompt, example)` has its parameters in another order", "write `def f(prompt, compl")],
    ),
    "batches": ("def f(prompts, completions, answer): return 1", [(1, "one call scores one completion", "write `de")]),
    "batches and keywords": ("def f(completions, **kwargs): return 1", [(1, "one call scores one completion", "")]),
    "async generator": ("async def f(a, b, c):\n    yield 1", [(2, "generator", "use `return`")]),
    "all completions of a prompt": (
        "def f(prompt, completions, example): return [1]",
        [(1, "takes all completions of a prompt", "per='group'")],
    ),
    "generator": ("def f(a, b, c):\n    x = 1\n    yield x", [(3, "generator", "use `return`")]),
    "yield from": ("def f(a, b, c):\n    yield from b", [(2, "generator", "")]),
    "standard library": ("def f(a, b, c):\n    return re.x", [(2, "`re` is not defined", "write `import re` inside")]),
    "misspelt": ("def f(prompt, b, c):\n    return promt", [(2, "`promt`", "did you mean `prompt`?")]),
    "misspelt builtin": ("def f(a, b, c):\n    return flaot(b)", [(2, "`flaot`", "did you mean `float`?")]),
    "unknown": ("def f(a, b, c):\n    return np.mean(b)", [(2, "`np`", "import or define it inside")]),
    "once per name": ("def f(a, b, c):\n    x = np\n    return np", [(2, "`np`", "")]),
    "in a nested function": ("def f(a, b, c):\n    def g():\n        return np\n    return g()", [(3, "`np`", "")]),
    "in a comprehension": ("def f(a, b, c):\n    return [\n        x + y for x in b]", [(3, "`y`", "")]),
    "in a class": ("def f(a, b, c):\n    class K:\n        x = y\n    return K", [(3, "`y`", "")]),
    "in an f-string": ("def f(a, b, c):\n    return f'{b:>{width}}'", [(2, "`width`", "")]),
    "in a default": ("def f(a, b, c=D): return 1", [(1, "`D`", "")]),
    "in an except clause": (
        "def f(a, b, c):\n    try: g = 1\n    except Wrong: pass\n    return g",
        [(3, "`Wrong`", "")],
    ),
    "in a nested annotation": ("def f(a, b, c):\n    def g(x: Any): return x\n    return g(1)", [(2, "`Any`", "")]),
    "file": ("def f(a, b, c):\n    return __file__", [(2, "`__file__`", "")]),
    "several at once": (
        "import os\ndef f(a):\n    yield np",
        [(1, "import os", ""), (2, "f(a)", ""), (3, "yield", ""), (3, "np", "")],
    ),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED)
def test_problems_have_their_line_and_fix(text: str, expected: list[tuple[int, str, str]]) -> None:
    problems = check(text)
    assert [problem.line for problem in problems] == [line for line, _, _ in expected], problems
    for problem, (_, message, fix) in zip(problems, expected, strict=True):
        assert message in problem.message
        assert fix in problem.fix
    with pytest.raises(SourceError, match=f"line {expected[0][0]}: "):
        compile_function(text, "<f>")


def test_a_problem_reads_as_one_line() -> None:
    assert (
        str(Problem(3, "`re` is not defined", "write `import re`")) == "line 3: `re` is not defined; write `import re`"
    )


ACCEPTED = {
    "signature annotations": "def f(a: Prompt, /, b: 'x', c: dict[str, Any]) -> Reward: return 1",
    "names of one's own": "def f(question, completion, examples): return 1",
    "defaults": "def f(a='', b='', c=None): return 1",
    "settings": "def f(a, b, c, *, d=1, e: Unknown = 2): return d + e",
    "docstring and comments": "# about it\n\ndef f(a, b, c):\n    '''Says.'''\n    return 1  # one\n\n# end\n",
    "one line": "def f(a, b, c): return 1",
    "static method": "@staticmethod\ndef f(a, b, c): return 1",
    "Windows line ends": "def f(a, b, c):\r\n    return 1\r\n",
    "imports inside": """
        import re, os.path as path
        from math import pi as p
        import xml.dom
        return re.x, path, p, xml
        """,
    "local annotation": "x: Unknown = 1\nreturn x",
    "comprehensions": "return [x for x in b if x], {x: y for x, y in c.items()}, {x for x in b}, list(x for x in b)",
    "nested comprehension": "return [[z + x for z in y] for x, y in enumerate([b])]",
    "walrus": "return [y for x in b if (y := x)] and y if (n := len(b)) else n",
    "nested functions": """
        def outer(x, *rest, key=None, **others):
            def inner():
                nonlocal x
                x += 1
                return x, rest, key, others
            return inner
        return outer(1)
        """,
    "lambda inside": "return sorted(b, key=lambda x: (x, c))",
    "class inside": """
        from dataclasses import dataclass
        class Base:
            n: int = 1
            m = n + 1
            def __init__(self):
                super().__init__()
                self.q = __class__, Base
        @dataclass
        class Pair(Base):
            x: int
            y: list[int]
        return Pair(1, [])
        """,
    "global": """
        global seen
        try:
            seen += 1
        except NameError:
            seen = 1
        def other():
            return seen
        return other()
        """,
    "except as": """
        try:
            return 1
        except (ValueError, KeyError) as error:
            print(error)
        """,
    "exception group": """
        try:
            x = 1
        except* TypeError as group:
            print(group)
        return 1
        """,
    "match": """
        match c:
            case {"a": [first, *others], **rest} if first:
                return others, rest
            case str() | int() as value:
                return value
            case (x, y):
                return x, y
            case _:
                return 0
        """,
    "f-strings": """return f"{b!r:>{len(a)}} {c['x']:.2f} {', '.join(w for w in b)} {b=}" """,
    "with and for": """
        import contextlib
        with contextlib.nullcontext(1) as x, contextlib.nullcontext((1, 2)) as (y, *z):
            pass
        for i, (j, k) in enumerate([(1, 2)]):
            pass
        else:
            i = 0
        del x
        return y, z, i, j, k
        """,
    "builtins": "return __name__, NotImplemented, Ellipsis, __import__('re'), aiter, ExceptionGroup, __builtins__",
    "exec and eval": "return eval('x', {'__builtins__': None}, {'x': 1})",
    "nested async and generators": """
        import asyncio
        async def later():
            async for x in agen():
                await asyncio.sleep(0)
            return [y async for y in agen()]
        async def agen():
            yield 1
        def gen():
            yield from range(3)
        return asyncio.run(later()), sum(gen())
        """,
    "unreachable": "if False:\n    never_seen\nreturn 1",
    "star expressions": "first, *rest = b\nreturn [*rest, first], {**c}, (*a,)",
    "type checking only": "if __debug__:\n    pass\nassert c, f'{c}'\nreturn 1",
}


REFUSED_OF_A_GROUP = {
    "one completion": ("def f(prompt, completion, example): return [1]", "takes one completion, but per='group'"),
    "many prompts": ("def f(prompts, completions, example): return [1]", "takes whole batches"),
    "two parameters": ("def f(prompt, completions): return [1]", "does not have exactly three parameters"),
    "swapped": ("def f(completions, prompt, example): return [1]", "in another order"),
}


@pytest.mark.parametrize(("text", "says"), REFUSED_OF_A_GROUP.values(), ids=REFUSED_OF_A_GROUP)
def test_signatures_of_functions_for_a_whole_group(text: str, says: str) -> None:
    (problem,) = check(text, "group")
    assert says in problem.message
    assert "`def f(prompt, completions, example)`" in problem.fix


def test_functions_for_a_whole_group_and_those_that_wait() -> None:
    assert check("def f(prompt, completions, example): return [len(c) for c in completions]", "group") == []
    assert check("def f(p, cs, e): return [1]", "group") == []
    assert check("async def f(prompt, completion, example): return 1") == []
    assert check("async def f(prompt, completions, example): return [1]", "group") == []


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED)
def test_no_false_alarm(text: str) -> None:
    if "def f(" not in text:
        text = "def f(a, b, c):\n" + textwrap.indent(textwrap.dedent(text).strip("\n"), "    ")
    assert check(text) == []
    compile_function(text, "<f>")


def test_names_that_a_prompt_adds_to_the_builtins_are_not_taken_for_builtins() -> None:
    code = """
import builtins
builtins._ = builtins.get_ipython = 1
from rewardsmith.rewards.source import check
print(len(check("def f(a, b, c): return _, get_ipython")))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2\n"


# ---- running it -----------------------------------------------------------------------------------------------------


def test_compiled_function_shows_its_lines_in_tracebacks() -> None:
    function = compile_function("def f(a, b, c):\n    # above\n    return c['x']  # this one\n", "<reward f>")
    with pytest.raises(KeyError) as caught:
        function("", "", {})
    assert str(caught.traceback[-1].path) == "<reward f>"
    assert caught.traceback[-1].lineno + 1 == 3
    import traceback

    assert "return c['x']  # this one" in "".join(traceback.format_exception(caught.value))


def test_every_function_has_its_own_namespace() -> None:
    text = "def f(a, b, c):\n    global n\n    try: n += 1\n    except NameError: n = 1\n    return n"
    first, second = compile_function(text, "<1>"), compile_function(text, "<2>")
    assert [first("", "", {}), first("", "", {}), second("", "", {})] == [1, 2, 1]


def test_the_sandbox_compiles_as_this_module_does() -> None:
    text = source_of(module_level)
    here, there = compile_function(text, "<f>"), loading.load_function(text, "<f>")
    assert here.__code__ == there.__code__
    assert here.__annotations__ == there.__annotations__ == {}


def test_only_the_standard_library_is_imported_by_what_runs_anywhere() -> None:
    assert source.__file__ and loading.__file__
    for path in [Path(source.__file__), *Path(loading.__file__).parent.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names), (path, names)
