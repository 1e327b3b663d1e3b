"""JSON Schema: each supported keyword both ways, all others refused by name, and what a model might try."""

from typing import Any

import pytest

from rewardsmith.rewards.library import json_schema

FITS: list[tuple[dict[str, Any] | bool, str, str]] = [  # schema, what fits, what does not
    ({"type": "object"}, "{}", "[]"),
    ({"type": "integer"}, "1.0", "1.5"),
    ({"type": "integer"}, "-3", "true"),
    ({"type": "number"}, "1e3", '"1"'),
    ({"type": "boolean"}, "true", "1"),
    ({"type": ["string", "null"]}, "null", "0"),
    ({"enum": [1, "a", None]}, "1.0", "true"),
    ({"const": {"a": [1]}}, '{"a": [1.0]}', '{"a": [true]}'),
    ({"const": False}, "false", "0"),
    ({"enum": [1, 2], "const": 2}, "2", "1"),
    ({"minimum": 3, "maximum": 4}, "3", "4.1"),
    ({"exclusiveMinimum": 3, "exclusiveMaximum": 4}, "3.5", "3"),
    ({"multipleOf": 0.01}, "0.07", "0.075"),
    ({"minLength": 2, "maxLength": 3}, '"äö"', '"a"'),
    ({"pattern": "^a+$"}, '"aaa"', '"ab"'),
    ({"minItems": 1, "maxItems": 2}, "[1]", "[]"),
    ({"uniqueItems": True}, "[1, true, 2]", "[1, 1.0]"),
    ({"items": {"type": "string"}}, '["a"]', '["a", 1]'),
    ({"prefixItems": [{"type": "string"}], "items": {"type": "number"}}, '["a", 1]', '["a", "b"]'),
    ({"items": False, "prefixItems": [True]}, "[1]", "[1, 2]"),
    ({"required": ["a"]}, '{"a": null}', '{"b": 1}'),
    ({"properties": {"a": {"type": "string"}}}, '{"b": 1}', '{"a": 1}'),
    ({"properties": {"a": True}, "additionalProperties": False}, '{"a": 1}', '{"a": 1, "b": 2}'),
    ({"additionalProperties": {"type": "number"}}, '{"x": 1}', '{"x": "1"}'),
    ({"minProperties": 1, "maxProperties": 1}, '{"a": 1}', "{}"),
    ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, "2", "3"),
    ({"anyOf": [{"type": "string"}, {"minimum": 5}]}, "6", "4"),
    ({"oneOf": [{"minimum": 1}, {"minimum": 5}]}, "2", "6"),
    ({"not": {"type": "null"}}, "0", "null"),
    ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "number"}}}, "1", '"1"'),
    ({"$ref": "#/definitions/a~1b", "definitions": {"a/b": {"minimum": 1}}}, "1", "0"),
    (
        {"properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
        '{"next": {"next": {}}}',
        '{"next": {"x": 1}}',
    ),
    ({"title": "t", "description": "d", "default": 1, "examples": [], "$schema": "s", "type": "null"}, "null", "1"),
    ({"minimum": 5, "minLength": 5}, "true", "4"),
]


@pytest.mark.parametrize(("schema", "good", "bad"), FITS, ids=[" ".join(schema) for schema, _, _ in FITS])
def test_keywords(schema: dict[str, Any], good: str, bad: str) -> None:
    assert json_schema("", good, {"schema": schema}) == 1.0
    assert json_schema("", bad, {"schema": schema}) == 0.0


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"format": "date"}, "'format' at #"),
        ({"properties": {"a": {"anyOf": [{"if": True}]}}}, "'if' at #/properties/a/anyOf/0"),
        ({"patternProperties": {}}, "'patternProperties'"),
        ({"$defs": {"unused": {"contains": {}}}}, "'contains' at #/\\$defs/unused"),
        ({"$ref": "http://example.com/s.json"}, "leads out of the schema"),
        ({"type": "text"}, "unknown type 'text'"),
        ({"items": [{}]}, "no rule at #/items"),
    ],
)
def test_what_is_not_checked_is_refused_by_name_even_if_the_answer_is_no_match(
    schema: dict[str, Any], says: str
) -> None:
    for completion in ("{}", "[]", "1"):
        with pytest.raises(ValueError, match=says):
            json_schema("", completion, {"schema": schema})


def test_not_json_is_a_zero_whatever_the_schema() -> None:
    deep, huge = "[" * 100_000, "9" * 10_000
    texts = ["", "yes", "{'a': 1}", '{"a": 1} and more', "NaN", "[Infinity]", "1e999", deep, deep + "]" * 100_000, huge]
    for text in [*texts, '```json\n{"a": 1}\n```\n```json\n{"a": 2}\n```']:
        assert json_schema("", text, {"schema": {}}) == 0.0
    assert json_schema("", "[" * 50 + "]" * 50, {"schema": {}}) == 1.0
    assert json_schema("", '["' + "[" * 99 + '"]', {"schema": {}}) == 1.0


def test_fences_and_schema_as_text_and_as_a_setting() -> None:
    assert json_schema("", '```json\n{"a": 1}\n```', {"schema": '{"required": ["a"]}'}) == 1.0
    assert json_schema("", '```\n{"a": 1}\n```', {}, schema={"required": ["a"]}) == 1.0
    assert json_schema("", "{}", {"shape": {"required": ["a"]}}, column="shape") == 0.0


def test_the_reason_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    schema = {"properties": {"people": {"items": {"required": ["name"]}}}}
    assert json_schema("", '{"people": [{"name": "x"}, {}]}', {"schema": schema}) == 0.0
    assert capsys.readouterr().out == "answer.people[1].name is missing\n"


def test_overlap_of_properties_in_part() -> None:
    name = {"type": "string"}
    schema = {
        "properties": {
            "name": name,
            "home": {"properties": {"city": name}},
            "tags": {"items": {"properties": {"x": name}}},
        }
    }
    answer = (
        '{"name": 1, "home": {"city": "B", "zip": 1}}'  # .name .home .home.city of .tags .tags[].x too, and .home.zip
    )
    assert json_schema("", answer, {"schema": schema}, partial=0.6) == pytest.approx(0.6 * 3 / 6)
    assert json_schema("", "{}", {"schema": {**schema, "required": ["name"]}}, partial=0.6) == 0.0
    assert json_schema("", "no json", {"schema": schema}, partial=0.6) == 0.0
    loop = {"properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    assert 0 < json_schema("", '{"next": {}}', {"schema": loop}, partial=1.0) < 0.1
