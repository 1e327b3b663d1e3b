"""How long an executor is used: which functions get a process per call, when an executor is worn out, the canary.

A warm executor is fast, and what one call changes in it the next call meets. So functions that run text of the model
are forked for each call, executors are replaced now and then, and between calls a question is asked again whose answer
is known: another answer means that a call has changed the process. This contains accidents and simple tricks; it is
no boundary against a model that puts everything back before it returns. Rules only: `pool` acts on them.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rewardsmith.rewards.calls import Call, Result
from rewardsmith.rewards.executor import Executor
from rewardsmith.wire import RevisionFunction

Mode = Literal["auto", "warm", "chunk", "call"]

CHUNK = 16  # calls that an executor lives for in mode "chunk"
WARM_CALLS = 10_000
WARM_SECONDS = 900.0

# What runs a text as code. `re.compile` and `ast.literal_eval` do not, so names count where they stand alone.
_RUNNING_NAMES = {"exec", "eval", "compile", "__import__", "execfile", "sympify", "parse_expr"}
_RUNNING_MODULES = {"importlib", "subprocess", "runpy", "code", "codeop"}
_RUNNING_ATTRIBUTES = {f"os.{name}" for name in ("system", "popen", "fork", "execv", "execve", "posix_spawn")} | {
    f"builtins.{name}" for name in ("exec", "eval", "compile", "__import__")
}

CANARY_TRIES = 3  # questions that may turn out to have no certain answer
CANARY_SECONDS = 0.001  # up to which it is asked after every chunk
CANARY_SHARE = 0.05  # of all the time that calls take, for slower ones


def runs_text(source: str) -> str | None:
    """What in a function may run text as code, as far as its own text shows; None when nothing does.

    A convenience, no check: it cannot see into packages. `run_python` is no reason, its programs are apart anyway.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in _RUNNING_NAMES:
            return node.id
        if isinstance(node, ast.Attribute) and ast.unparse(node) in _RUNNING_ATTRIBUTES:
            return ast.unparse(node)
        for module in _imported(node):
            if module.partition(".")[0] in _RUNNING_MODULES:
                return module
    return None


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


@dataclass(frozen=True)
class Way:
    """How one function is run."""

    function: RevisionFunction
    mode: Mode
    is_async: bool

    @classmethod
    def of(cls, function: RevisionFunction, mode: Mode) -> Way:
        if mode == "auto":
            mode = "call" if runs_text(function.source) else "warm"
        is_async = any(isinstance(node, ast.AsyncFunctionDef) for node in ast.parse(function.source).body)
        return cls(function, mode, is_async)

    @property
    def forked(self) -> bool:
        """Each call has a process of its own."""
        return self.mode == "call"

    @property
    def together(self) -> bool:
        """Several calls share an event loop."""
        return self.is_async and not self.forked

    @property
    def watched(self) -> bool:
        """The canary is asked."""
        return self.mode == "warm" and not self.is_async


def is_worn(executor: Executor, now: float) -> bool:
    """Whether it is to be replaced before it gets more to do."""
    old = executor.served >= WARM_CALLS or now - executor.born > WARM_SECONDS
    return executor.worn or (old and executor.served > 0)


@dataclass
class _Question:
    """A call of one function: asked for a score, and once more of an executor that had done nothing else."""

    call: Call
    answer: tuple[float, ...] | None = None
    certain: bool = False
    seconds: float = 0.0


class Canary:
    """One question for each warm function, which has the same answer as long as nobody changes the process.

    The answer counts when the call that was scored and its repetition in a fresh executor agree in every bit.
    """

    def __init__(self) -> None:
        self._questions: dict[int, _Question] = {}
        self._tries: dict[int, int] = {}
        self.called_seconds = self.asked_seconds = 0.0

    def propose(self, calls: Sequence[Call]) -> list[Call]:
        """From the calls of a `score`, what a fresh executor is to answer as well."""
        probes = []
        for call in calls:
            if call.function not in self._questions and self._tries.get(call.function, 0) < CANARY_TRIES:
                self._tries[call.function] = self._tries.get(call.function, 0) + 1
                self._questions[call.function] = _Question(call.probe())
                probes.append(self._questions[call.function].call)
        return probes

    def questions(self, functions: set[int]) -> list[Call]:
        """What to ask behind calls of these functions."""
        due = []
        for function in sorted(functions):
            question = self._questions.get(function)
            if question is None or not question.certain:
                continue
            seconds = self.asked_seconds + question.seconds
            if question.seconds <= CANARY_SECONDS or seconds <= CANARY_SHARE * self.called_seconds:
                due.append(question.call)
        return due

    def heard(self, call: Call, results: Sequence[Result], *, fresh: bool) -> bool:
        """Take in an answer; False when it is not the known one. What a fresh executor says is taken for right."""
        question = self._questions.get(call.function)
        if question is None or question.call is not call:
            return True
        answer = answer_of(results)
        self.asked_seconds += results[0].seconds
        question.seconds = min(question.seconds or results[0].seconds, results[0].seconds)
        if question.answer is None and fresh:
            question.answer = answer
            if answer is None:
                del self._questions[call.function]
            return True
        if answer == question.answer:
            return True
        if fresh:
            del self._questions[call.function]  # it has no certain answer after all
        return False

    def scored(self, function: int, scored: tuple[float, ...] | None) -> None:
        """What the call of the question was scored: the answer is certain if that is the same."""
        question = self._questions.get(function)
        if question is None or question.certain:
            return
        question.certain = question.answer is not None and question.answer == scored
        if not question.certain:
            del self._questions[function]


def answer_of(results: Sequence[Result]) -> tuple[float, ...] | None:
    values = tuple(result.value for result in results)
    return values if all(result.outcome == "ok" for result in results) else None
