"""A home may have any name: database, artifacts and the search in segments find it, and nothing lies elsewhere."""

from pathlib import Path

import pytest
from stored import OWNER_ID, claim, completion, create_job, report_step, write_segment

from rewardsmith.home import ServerConfig
from rewardsmith.store import Store


@pytest.mark.parametrize("name", ["we?ird", "per%20cent", "with a space", "has#hash", "a[b]c", "st*r", "ünï"])
def test_everything_lies_in_a_home_of_any_name(tmp_path: Path, name: str) -> None:
    config = ServerConfig(home=tmp_path / name)
    config.home.mkdir()
    store = Store(config.database_url, config.artifacts_url)
    assert store.registry.ensure_owner("owner-token").user_id == OWNER_ID
    store.artifacts.put("some/file", b"content")
    assert store.artifacts.get("some/file") == store.artifacts.fetch("some/file").read_bytes() == b"content"
    create_job(store)
    claimed = claim(store)
    report_step(store, claimed, 1, segments=[write_segment(store, claimed.uuid, [completion(1, 0)])])
    assert [row["idx"] for row in store.completions.completions(claimed.uuid).data] == [0]
    store.close()
    assert list(tmp_path.iterdir()) == [config.home]
    assert (config.home / "rewardsmith.sqlite").is_file() and (config.home / "artifacts" / "some" / "file").is_file()
