"""One server for each test module here, with the repo `sums` and the dataset `rows`."""

from collections.abc import Iterator

import pytest
from server.running import Running, running


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("api") / "home", max_body_bytes=200_000, max_dataset_bytes=500_000) as server:
        server.prepare()
        yield server
