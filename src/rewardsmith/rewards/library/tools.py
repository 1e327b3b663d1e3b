"""Is the tool call of the answer the right one? Name and arguments are compared with a reference call.

The function stands alone; settings are keyword-only parameters.
"""

from typing import Any


def tool_call(
    prompt: str,
    completion: str,
    example: dict[str, Any],
    *,
    column: str = "ground_truth",
    partial: bool = False,
    loose: bool = False,
) -> float:
    """1 if the completion is one function call, the reference's function with the reference's arguments.

    The call is one JSON object, {"name": ..., "arguments": {...}}: alone, in one ``` fence, or in one
    <tool_call> </tool_call> with any text before it. `parameters` for `arguments`, arguments as JSON text, OpenAI's
    {"function": {...}} around it and a list of one call are read as well.

    Range: 0 or 1; with `partial` 0 to 1.
    Reads: `column`, either {"name": ..., "arguments": {...}} with the exact arguments, or the form of the Berkeley
    leaderboard, {name: {argument: [accepted values]}}, where "" among them means that it may be left out.
    Settings: `partial`: with the right name, the share of right arguments among all expected and all given;
    `loose` compares texts without case, blanks and punctuation.
    Gamed by: little, the arguments have to be right. More than one call earns nothing. With `partial`, a call with only
    the arguments that are easy to guess earns its share.
    """
    import json
    import re
    from typing import Any

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    def read(text: str) -> Any:
        return json.loads(text, parse_constant=refuse)

    def call_of(text: str) -> tuple[str, dict[str, Any]] | None:
        if "<tool_call>" in text:
            text, closed, after = text.partition("<tool_call>")[2].rpartition("</tool_call>")
            if not closed or after.strip():
                return None
        fence = re.fullmatch(r"```(?:json)?\n(.*)```", text.strip(), re.DOTALL)
        try:
            call = read(fence[1] if fence else text)
            if isinstance(call, list) and len(call) == 1:
                call = call[0]
            if isinstance(call, dict) and isinstance(call.get("function"), dict):
                call = call["function"]
            if not isinstance(call, dict):
                return None
            given = call.get("arguments", call.get("parameters"))
            given = read(given) if isinstance(given, str) else given
        except (ValueError, RecursionError):  # the model's text, not our fault
            return None
        return (call["name"], given) if isinstance(call.get("name"), str) and isinstance(given, dict) else None

    def same(value: Any, wanted: Any) -> bool:
        if isinstance(value, bool) or isinstance(wanted, bool):
            return value is wanted
        if loose and isinstance(value, str) and isinstance(wanted, str):
            return re.sub(r"[\W_]", "", value.lower()) == re.sub(r"[\W_]", "", wanted.lower())
        return bool(value == wanted)

    def fits(value: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict):  # its values are lists of accepted ones
            return isinstance(value, dict) and value.keys() <= wanted.keys() and all(rights(value, wanted).values())
        if isinstance(wanted, list):
            return isinstance(value, list) and len(value) == len(wanted) and all(map(fits, value, wanted))
        return same(value, wanted)

    def rights(given: dict[str, Any], wanted: dict[str, Any]) -> dict[str, bool]:
        """For each argument that is expected or given, whether it is right."""
        verdicts = {}
        for name in {**wanted, **given}:
            accepted = wanted.get(name, [])
            accepted = accepted if isinstance(accepted, list) else [accepted]
            if name in given:
                verdicts[name] = any(fits(given[name], option) for option in accepted)
            elif "" not in accepted or exact:
                verdicts[name] = False
        return verdicts

    def only(value: Any) -> Any:
        """An exact value in the form of accepted ones."""
        if isinstance(value, dict):
            return {name: [only(inner)] for name, inner in value.items()}
        return [only(inner) for inner in value] if isinstance(value, list) else value

    reference = example[column]
    reference = json.loads(reference) if isinstance(reference, str) else reference
    reference = reference[0] if isinstance(reference, list) and len(reference) == 1 else reference
    exact = isinstance(reference, dict) and {"name", "arguments"} <= reference.keys()
    if exact:
        reference = {reference["name"]: only(reference["arguments"])}
    if not isinstance(reference, dict) or len(reference) != 1 or not isinstance(next(iter(reference.values())), dict):
        raise ValueError(f"column {column!r} is not one call: {str(reference)[:200]}")
    ((name, wanted),) = reference.items()
    call = call_of(completion)
    if call is None or call[0] != name:
        return 0.0
    verdicts = rights(call[1], wanted)
    share = sum(verdicts.values()) / len(verdicts) if verdicts else 1.0
    return share if partial else float(share == 1.0)
