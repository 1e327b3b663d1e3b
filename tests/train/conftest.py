from pathlib import Path

import pytest
from job_runs import rows, write_rows
from tiny_models import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a job's files are, with six rows to train on and three held out."""
    write_rows(tmp_path, rows(6, 3))
    return tmp_path
