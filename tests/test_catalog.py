"""Names of base models."""

import json
from pathlib import Path

import pytest

from rewardsmith import catalog
from rewardsmith.errors import ConfigError


def test_an_alias_a_folder_and_a_hub_id_are_found(tmp_path: Path):
    assert catalog.source_of("countdown-tiny") == str(catalog.EMBEDDED)
    assert catalog.source_of("qwen2-5-7b-instruct") == "Qwen/Qwen2.5-7B-Instruct"
    assert catalog.source_of("someone/some-model") == "someone/some-model"
    assert catalog.source_of(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qwen2-5-7b-instrct", "did you mean 'qwen2-5-7b-instruct'"),
        ("/nope/model", "no such folder"),
        ("./model", "no such folder"),
        ("a/b/c", "no known alias"),
    ],
)
def test_any_other_name_is_refused_with_a_hint(name: str, says: str):
    with pytest.raises(ConfigError, match=says):
        catalog.source_of(name)


def test_the_context_of_the_embedded_model_is_that_of_its_config():
    config = json.loads((catalog.EMBEDDED / "config.json").read_text())
    assert catalog.ALIASES["countdown-tiny"].context == config["max_position_embeddings"]
