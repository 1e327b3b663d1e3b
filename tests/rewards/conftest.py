"""Every test of the rewards must leave the machine as it found it: no process, no descriptor, no file."""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest


def _left_over(before: tuple[set[int], int, set[Path]]) -> list[object]:
    processes, descriptors, files = before
    found: list[object] = [child for child in psutil.Process().children(recursive=True) if child.pid not in processes]
    if len(os.listdir("/proc/self/fd")) > descriptors:
        found.append(os.listdir("/proc/self/fd"))
    return found + sorted(_scratch_folders() - files)


def _scratch_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("rewardsmith-rewards-*"))


def _wait_until(happened: Callable[[], object], complaint: Callable[[], str] = lambda: "it did not happen") -> None:
    give_up = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < give_up, complaint()
        time.sleep(0.01)


@pytest.fixture
def wait_until() -> Callable[[Callable[[], object]], None]:
    return _wait_until


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    before = (children, len(os.listdir("/proc/self/fd")), _scratch_folders())
    yield
    gc.collect()
    _wait_until(lambda: not _left_over(before), lambda: f"left over: {_left_over(before)}")
