"""Does the program of the answer pass the row's tests? Each test runs it in a process of its own.

The function stands alone; settings are keyword-only parameters. `run_python` exists where rewards run.
"""

from typing import Any


def code_tests(
    prompt: str,
    completion: str,
    example: dict[str, Any],
    *,
    column: str = "tests",
    seconds: float = 1.0,
    memory_bytes: int = 256 * 2**20,
    partial: bool = False,
) -> float:
    """1 if the Python program in the completion passes every test; the first failure is printed.

    The program is the last ``` fence of the completion, or else all of it. Tests are a list, or its JSON text, of
    {"input": ..., "output": ...}: standard input and what has to be printed, blanks at the ends of lines aside; or of
    assert statements as text. {"inputs": [...], "outputs": [...]} is read as well.

    Range: 0 or 1; with `partial` the share of tests passed, 0 to 1.
    Reads: `column`.
    Settings: `seconds` and `memory_bytes` for each test. All tests together have to end within the time of a call.
    Gamed by: tests that the prompt shows, by a program that knows just their answers: keep some hidden. Expected
    outputs, and the right side of `assert f(x) == value`, never reach the program's process. Of another assert only its
    truth is asked, which a program can forge: write comparisons with a value.
    """
    import ast
    import json
    import re
    import secrets
    from typing import Any

    from reward_tools import run_python

    def pairs(tests: Any) -> list[Any]:
        tests = json.loads(tests) if isinstance(tests, str) else tests
        if isinstance(tests, dict) and "fn_name" not in tests:
            both = zip(tests["inputs"], tests["outputs"], strict=True)
            tests = [{"input": given, "output": expected} for given, expected in both]
        if not isinstance(tests, list) or not tests:
            raise ValueError(f"column {column!r} holds no tests of a known form: {str(tests)[:200]}")
        return tests

    def lines(text: Any) -> list[str]:
        text = "\n".join(text) if isinstance(text, list) else str(text)
        return [line.rstrip() for line in text.rstrip().split("\n")]

    def of_output(test: dict[str, Any]) -> str:
        ran = run_python(
            program, stdin="\n".join(lines(test["input"])) + "\n", seconds=seconds, memory_bytes=memory_bytes
        )
        if ran.timeout or ran.rc != 0:
            return ended(ran)
        return "" if lines(ran.out) == lines(test["output"]) else f"printed {ran.out[:100]!r}"

    def of_assert(test: str) -> str:
        (statement,) = ast.parse(test).body
        if not isinstance(statement, ast.Assert):
            raise ValueError(f"a test in column {column!r} is no assert statement: {test[:100]}")
        asked, expected = f"bool({ast.unparse(statement.test)})", True
        compared = statement.test
        if isinstance(compared, ast.Compare) and len(compared.ops) == 1 and isinstance(compared.ops[0], ast.Eq):
            try:
                expected = ast.literal_eval(compared.comparators[0])
                asked = ast.unparse(compared.left)
            except ValueError:
                pass  # compared with something to be worked out
        # What the program prints by itself does not carry this mark.
        mark = secrets.token_hex(8)
        ran = run_python(f"{program}\nprint({mark!r} + repr({asked}))", seconds=seconds, memory_bytes=memory_bytes)
        _, found, answer = ran.out.rpartition(mark)
        if ran.timeout or not found:
            return ended(ran)
        try:
            right = ast.literal_eval(answer.strip()) == expected
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            right = False
        return "" if right else f"{asked} is {answer.strip()[:100]}"

    def ended(ran: Any) -> str:
        if ran.timeout:
            return f"ran longer than {seconds} s"
        last = ran.err.strip().rpartition("\n")[2]
        return f"ended with {ran.rc} before the test was over: {last[:200]}"

    fences = re.findall(r"```\w*\n(.*?)```", completion, re.DOTALL)
    program = fences[-1] if fences else completion
    tests = pairs(example[column])
    passed = 0
    for number, test in enumerate(tests, 1):
        fault = of_assert(test) if isinstance(test, str) else of_output(test)
        passed += not fault
        if fault and passed == number - 1:
            print(f"test {number} of {len(tests)}: {fault}")
        if fault and not partial:
            return 0.0
    return passed / len(tests)
