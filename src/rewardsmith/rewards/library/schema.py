"""Is the answer JSON of the wanted shape? A part of JSON Schema that the standard library can check exactly.

The function stands alone; settings are keyword-only parameters.
"""

from typing import Any


def json_schema(
    prompt: str,
    completion: str,
    example: dict[str, Any],
    *,
    column: str = "schema",
    schema: dict[str, Any] | None = None,
    partial: float = 0.0,
) -> float:
    """1 if the completion is JSON, alone or in one ``` fence, that fits a JSON Schema. Prints what does not fit.

    Range: 0 or 1; with `partial` JSON that does not fit earns up to that much.
    Reads: `column`, the schema as an object or as JSON text, where `schema` is not set.
    Settings: `schema`, one for all rows; `partial`, paid by the overlap of property paths (Jaccard) with the schema's.
    Keywords: type, enum, const, allOf, anyOf, oneOf, not, $ref within the schema, properties, required,
    additionalProperties, minProperties, maxProperties, items, prefixItems, minItems, maxItems, uniqueItems, minLength,
    maxLength, pattern (as Python reads it), minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf; titles,
    descriptions, defaults and examples are passed over. Any other keyword raises, by name: `format` for one.
    Gamed by: the smallest object that fits. Only what the schema demands is checked: say `required`,
    `additionalProperties: false` and `minLength`, and pair it with a reward for the content.
    """
    import json
    import math
    import re
    from fractions import Fraction
    from typing import Any

    silent = {"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated"}
    known = {
        "type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems",
        "uniqueItems", "minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum", "multipleOf",
    }  # fmt: skip
    of_one = {"not", "items", "additionalProperties"}
    of_list = {"allOf", "anyOf", "oneOf", "prefixItems"}
    of_names = {"properties", "$defs", "definitions"}

    def inspect(rule: Any, at: str) -> None:
        """Raise for what is not checked here, wherever it stands in the schema."""
        if isinstance(rule, bool):
            return
        if not isinstance(rule, dict):
            raise ValueError(f"the schema has no rule at {at}, but {rule!r}")
        for word, value in rule.items():
            if word in of_one:
                inspect(value, f"{at}/{word}")
            elif word in of_list:
                for number, inner in enumerate(value):
                    inspect(inner, f"{at}/{word}/{number}")
            elif word in of_names:
                for name, inner in value.items():
                    inspect(inner, f"{at}/{word}/{name}")
            elif word not in known | silent:
                raise ValueError(f"the schema's keyword {word!r} at {at} is not supported; remove it")

    def referred(place: str) -> Any:
        if not place.startswith("#"):
            raise ValueError(f"$ref {place!r} leads out of the schema; only '#/...' is supported")
        rule = root
        for step in place[1:].split("/")[1:]:
            rule = rule[step.replace("~1", "/").replace("~0", "~")]
        return rule

    def canonical(value: Any) -> str:
        """Equal for JSON values that are equal: 1 and 1.0 are, true and 1 are not."""
        return json.dumps(whole(value), sort_keys=True)

    def whole(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, dict):
            return {name: whole(inner) for name, inner in value.items()}
        return [whole(inner) for inner in value] if isinstance(value, list) else value

    def is_a(value: Any, kind: str) -> bool:
        if kind == "integer":
            return is_a(value, "number") and value == int(value)
        if kind == "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
        if kind not in kinds:
            raise ValueError(f"the schema has an unknown type {kind!r}")
        return isinstance(value, kinds[kind])

    def fault(value: Any, rule: Any, at: str) -> str:
        """What does not fit, with its place; nothing if all does."""
        if isinstance(rule, bool):
            return "" if rule else f"{at} must not be there"
        kinds = rule.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(is_a(value, kind) for kind in kinds):
            return f"{at} is not of type {' or '.join(kinds)}"
        options = rule.get("enum", [rule["const"]] if "const" in rule else None)
        if options is not None and canonical(value) not in [canonical(option) for option in options]:
            return f"{at} is not an accepted value"
        if "enum" in rule and "const" in rule and canonical(value) != canonical(rule["const"]):
            return f"{at} is not the accepted value"
        inner = [rule["$ref"]] if "$ref" in rule else []
        for each in [*(referred(place) for place in inner), *rule.get("allOf", [])]:
            if found := fault(value, each, at):
                return found
        if "anyOf" in rule and all(fault(value, each, at) for each in rule["anyOf"]):
            return f"{at} fits none of anyOf"
        if "oneOf" in rule and sum(not fault(value, each, at) for each in rule["oneOf"]) != 1:
            return f"{at} does not fit exactly one of oneOf"
        if "not" in rule and not fault(value, rule["not"], at):
            return f"{at} fits what it must not"
        if is_a(value, "number"):
            return fault_of_number(value, rule, at)
        if isinstance(value, str):
            return fault_of_text(value, rule, at)
        if isinstance(value, list):
            return fault_of_list(value, rule, at)
        return fault_of_object(value, rule, at) if isinstance(value, dict) else ""

    def fault_of_number(value: float, rule: dict[str, Any], at: str) -> str:
        if value < rule.get("minimum", -math.inf) or value <= rule.get("exclusiveMinimum", -math.inf):
            return f"{at} is too small"
        if value > rule.get("maximum", math.inf) or value >= rule.get("exclusiveMaximum", math.inf):
            return f"{at} is too large"
        step = rule.get("multipleOf")
        return f"{at} is no multiple of {step}" if step and Fraction(str(value)) % Fraction(str(step)) else ""

    def fault_of_text(value: str, rule: dict[str, Any], at: str) -> str:
        if not rule.get("minLength", 0) <= len(value) <= rule.get("maxLength", math.inf):
            return f"{at} has a wrong length"
        return f"{at} does not match the pattern" if not re.search(rule.get("pattern", ""), value) else ""

    def fault_of_list(value: list[Any], rule: dict[str, Any], at: str) -> str:
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", math.inf):
            return f"{at} has a wrong number of items"
        if rule.get("uniqueItems") and len({canonical(item) for item in value}) < len(value):
            return f"{at} has an item twice"
        first = rule.get("prefixItems", [])
        for number, item in enumerate(value):
            each = first[number] if number < len(first) else rule.get("items", True)
            if found := fault(item, each, f"{at}[{number}]"):
                return found
        return ""

    def fault_of_object(value: dict[str, Any], rule: dict[str, Any], at: str) -> str:
        if missing := [name for name in rule.get("required", []) if name not in value]:
            return f"{at}.{missing[0]} is missing"
        if not rule.get("minProperties", 0) <= len(value) <= rule.get("maxProperties", math.inf):
            return f"{at} has a wrong number of properties"
        for name, inner in value.items():
            each = rule.get("properties", {}).get(name, rule.get("additionalProperties", True))
            if found := fault(inner, each, f"{at}.{name}"):
                return found
        return ""

    def paths(value: Any, at: str = "") -> set[str]:
        if isinstance(value, list):
            return set().union(*(paths(item, f"{at}[]") for item in value))
        if not isinstance(value, dict):
            return set()
        return set().union(*({f"{at}.{name}"} | paths(inner, f"{at}.{name}") for name, inner in value.items()))

    def paths_of(rule: Any, at: str = "", depth: int = 20) -> set[str]:
        if isinstance(rule, dict) and "$ref" in rule and depth:
            return paths_of(referred(rule["$ref"]), at, depth - 1)
        if not isinstance(rule, dict):
            return set()
        found = paths_of(rule["items"], f"{at}[]", depth) if "items" in rule else set()
        for name, inner in rule.get("properties", {}).items():
            found |= {f"{at}.{name}"} | (paths_of(inner, f"{at}.{name}", depth - 1) if depth else set())
        return found

    def depth_of(text: str) -> int:
        deepest = depth = 0
        for sign in re.findall(r"[\[{\]}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
            depth += 1 if sign in "[{" else -1
            deepest = max(deepest, depth)
        return deepest

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    def finite(text: str) -> float:
        if math.isinf(float(text)):
            raise ValueError(f"{text} is too large")
        return float(text)

    root = example[column] if schema is None else schema
    root = json.loads(root) if isinstance(root, str) else root
    inspect(root, "#")
    fence = re.fullmatch(r"```(?:json)?\n(.*)```", completion.strip(), re.DOTALL)
    text = fence[1] if fence else completion
    try:
        # No answer that is meant is nested this deeply, and the checks above go down as far as the answer does.
        if depth_of(text) > 50:
            raise ValueError("nested more than 50 deep")
        answer = json.loads(text, parse_constant=refuse, parse_float=finite)
    except ValueError as error:
        print(f"not JSON: {error}")
        return 0.0
    found = fault(answer, root, "answer")
    if not found:
        return 1.0
    print(found)
    expected, given = paths_of(root), paths(answer)
    return partial * len(expected & given) / len(expected | given) if partial and expected | given else 0.0
