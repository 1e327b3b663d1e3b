"""What a return value is worth, and what an exception says: pure functions, run where user code runs.

Standard library only.
"""

import math
import os
import traceback

from .frames import KEPT_BYTES, LARGEST_VALUE

Verdict = tuple[str, float, str]  # outcome, value, error text

_HARNESS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_WITHIN = f"return a number from {-LARGEST_VALUE:g} to {LARGEST_VALUE:g}"


def judge(answer: object) -> Verdict:
    """Of one returned object. Numbers of other libraries are asked for their one item."""
    kind = type(answer)
    if answer is None:
        return "none", 0.0, "returned None (is a return missing?)"
    if not issubclass(kind, int | float) and hasattr(kind, "item"):
        try:
            answer = answer.item()  # type: ignore[attr-defined]
        except Exception as error:
            reason = cut(str(error)).decode()
            return "not_a_number", 0.0, f"returned a {kind.__name__} that is not one number ({reason})"
    # The methods of the base classes: a subclass may have its own idea of its value.
    if issubclass(type(answer), float):
        number = float.__float__(answer)  # type: ignore[arg-type]
    elif issubclass(type(answer), int):
        try:
            number = int.__float__(answer)  # type: ignore[arg-type]
        except OverflowError:
            return "not_a_number", 0.0, f"returned an int too large to compare; {_WITHIN}"
    else:
        return "not_a_number", 0.0, f"returned a {kind.__name__}; return an int or a float"
    if not math.isfinite(number):
        return "not_a_number", 0.0, f"returned {number} ({kind.__name__}); return a finite number"
    if abs(number) > LARGEST_VALUE:
        return "not_a_number", 0.0, f"returned {number:g}, too large to compare; {_WITHIN}"
    return "ok", number, ""


def judge_group(answer: object, count: int) -> list[Verdict]:
    """Of what a function returned for a whole group of `count` completions: a list, tuple or one-dimensional array."""
    if hasattr(type(answer), "tolist"):
        answer = answer.tolist()  # type: ignore[attr-defined]
    if not isinstance(answer, list | tuple):
        fault = f"returned a {type(answer).__name__}; return a list with a number for each of the {count} completions"
    elif len(answer) != count:
        fault = f"returned {len(answer)} numbers for {count} completions"
    else:
        return [judge(number) for number in answer]
    return [("not_a_number", 0.0, fault)] * count


def judge_error(error: BaseException) -> Verdict:
    """Of anything raised; SystemExit and KeyboardInterrupt of user code are exceptions like others."""
    return "out_of_memory" if isinstance(error, MemoryError) else "exception", 0.0, text_of(error)


def text_of(error: BaseException) -> str:
    """The traceback from the user's first frame on."""
    frame = error.__traceback__
    while frame and frame.tb_frame.f_code.co_filename.startswith(_HARNESS):
        frame = frame.tb_next
    try:
        return "".join(traceback.TracebackException(type(error), error, frame).format())
    except BaseException:  # __str__ of an exception is user code as well
        return f"{type(error).__name__} (its text cannot be made)"


def cut(text: str) -> bytes:
    """UTF-8 of `text`, without its middle when it is long: both ends of a traceback say something."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= KEPT_BYTES:
        return data
    half = KEPT_BYTES // 2
    head, tail = data[:half].decode("utf-8", "ignore"), data[-half:].decode("utf-8", "ignore")
    return f"{head}\n[{len(data) - 2 * half} bytes cut]\n{tail}".encode()
