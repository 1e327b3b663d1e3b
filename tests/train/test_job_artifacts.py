from pathlib import Path

import pytest
from job_runs import config, spec

from rewardsmith.errors import JobError
from rewardsmith.train.artifacts import JobArtifacts


def test_a_file_is_written_once_and_never_changed(tmp_path: Path):
    artifacts = JobArtifacts(spec(tmp_path, tmp_path, config()))
    path = artifacts.path("states", "1")
    large = bytes(range(256)) * 50_000  # more than one part of a multipart upload
    artifacts.put(path, large)
    artifacts.put(path, large)  # as after an answer that was lost
    with pytest.raises(JobError, match="is there already"):
        artifacts.put(path, b"another content")
    assert artifacts.get(path) == large


def test_attempts_have_paths_of_their_own(tmp_path: Path):
    first, second = (JobArtifacts(spec(tmp_path, tmp_path, config(), fence=fence)) for fence in (1, 2))
    assert first.path("states", "1") != second.path("states", "1")
