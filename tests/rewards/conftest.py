"""Every test of the rewards must leave the machine as it found it: no process, no descriptor, no file."""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import reward_pools

from rewardsmith.rewards.sandbox.tiers import Tier


def _wait_until(happened: Callable[[], object], complaint: Callable[[], str] = lambda: "it did not happen") -> None:
    give_up = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < give_up, complaint()
        time.sleep(0.01)


@pytest.fixture
def wait_until() -> Callable[[Callable[[], object]], None]:
    return _wait_until


@pytest.fixture(params=reward_pools.TIERS)
def every_tier(request: pytest.FixtureRequest) -> Tier:
    """The test is run in each tier that this machine has."""
    tier = reward_pools.choose(request.param)
    if tier is None:
        pytest.skip(f"this machine has no other tier to be {request.param}")
    return tier


@pytest.fixture(autouse=True)
def leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    children = set(psutil.Process().children(recursive=True))
    descriptors = len(os.listdir("/proc/self/fd"))

    def left_over() -> list[object]:
        found: list[object] = [*set(psutil.Process().children(recursive=True)) - children, *scratch.iterdir()]
        open_now = os.listdir("/proc/self/fd")
        return [*found, open_now] if len(open_now) > descriptors else found

    yield
    gc.collect()
    _wait_until(lambda: not left_over(), lambda: f"left over: {left_over()}")
