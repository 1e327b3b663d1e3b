from collections.abc import Iterator
from pathlib import Path

import pytest
from stored import open_store

from rewardsmith.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store on a real SQLite file and a real folder, with its owner as user 1."""
    opened = open_store(tmp_path)
    opened.registry.ensure_owner("owner-token")
    yield opened
    opened.close()
