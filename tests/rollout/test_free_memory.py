"""Free memory of a device: the machine's own for CPUs, what the driver and torch's allocator have left on a GPU."""

from pathlib import Path

import pytest
import torch

from rewardsmith import machine
from rewardsmith.rollout.memory import free_bytes


def test_a_cpu_has_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemAvailable:    4000 kB\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert free_bytes(torch.device("cpu")) == 4000 * 1024


def test_blocks_that_torch_keeps_for_itself_are_free(monkeypatch: pytest.MonkeyPatch):
    """No GPU is needed: what driver and allocator would say is put in."""
    asked = []

    def say(value):
        return lambda device: asked.append(device) or value

    monkeypatch.setattr(torch.cuda, "mem_get_info", say((1000, 80_000)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", say(700))
    monkeypatch.setattr(torch.cuda, "memory_allocated", say(300))
    card = torch.device("cuda", 1)
    assert free_bytes(card) == 1000 + 700 - 300
    assert asked and set(asked) == {card}
