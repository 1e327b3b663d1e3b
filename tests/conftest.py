"""Fixtures that more than one folder of tests uses."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: a thread that spins while it waits takes whole time slices from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from processes import Server


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test talks to the server, or reads the home, of whoever runs the tests."""
    for name in ("REWARDSMITH_BASE_URL", "REWARDSMITH_API_TOKEN", "PREDIBASE_GATEWAY", "PREDIBASE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REWARDSMITH_HOME", str(tmp_path / "no-home"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`rewardsmith serve` in a process of its own, with a dispatcher and an empty home."""
    with Server(tmp_path_factory.mktemp("server") / "home") as running:
        yield running
