"""How long a run will still take, and the most memory it has needed: forecast from its own steps, live.

The loop hands in the seconds of each step by phase, as they are reported (`seconds/<phase>`), and gets metrics back.
All arithmetic is on recent steps of this attempt: a resumed job begins anew, on whatever machine it is then. What a
run would take before there is one to look at is the business of `estimate`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

from rewardsmith.quantities import duration, figure, size

RECENT = 20  # steps: enough to even out chance, few enough to follow completions that grow longer
RECENT_EVALUATIONS = 3
CALIBRATION = 2  # steps after the first, which warms up caches, kernels and allocators and is never counted
# Not part of a step: waiting for the server or the end of a pause says nothing about the steps to come, and
# evaluations are counted by themselves.
NOT_OF_A_STEP = {"wait", "evaluate"}
SAVE = "report and save"


@dataclass(frozen=True)
class StepSeconds:
    """One step. `revision` of the rewards that scored it."""

    revision: int
    phases: Mapping[str, float]


@dataclass
class Forecast:
    """What the steps of this attempt have shown. `held_out` and `batch` are numbers of completions.

    `save_every`: after how many steps there is a checkpoint, and before it an evaluation if rows are held out.
    """

    total_steps: int
    save_every: int
    held_out: int
    batch: int
    steps: deque[StepSeconds] = field(default_factory=lambda: deque(maxlen=RECENT))
    evaluations: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_EVALUATIONS))
    cold: bool = False  # whether the only evaluation is the one that warmed up
    counted: int = 0  # steps of this attempt, the first one included
    peak: int = 0
    highest: int = 0  # sum of the ranks' own high-water marks when `peak` was measured
    left: float | None = None

    def after(self, step: int, metrics: Mapping[str, float], revision: int) -> dict[str, float]:
        """Takes in the metrics of a step; gives `memory/peak_bytes` and, from the second step on, `forecast/...`.

        Step 0 is the evaluation before the first step. A number that is not known has no entry.
        """
        prefix = "seconds/"
        phases = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        if "evaluate" in phases:
            if self.cold:
                self.evaluations.clear()
            self.cold = step == 0
            self.evaluations.append(phases["evaluate"])
        if step == 0:
            return {}
        self.counted += 1
        if self.counted > 1:
            if (step - 1) % self.save_every == 0:
                # The clock of a step holds the sending, and the saving, of the one before.
                phases[SAVE] = phases.pop("report", 0.0)
            self.steps.append(StepSeconds(revision, phases))
        self._look_at_memory()
        found = {"memory/peak_bytes": float(self.peak)} if self.peak else {}
        if not self.steps:
            return found
        usual = by_phase(self.steps)
        self.left = self._seconds_left(step, usual)
        return found | {"forecast/seconds_per_step": per_step(usual), "forecast/seconds_left": self.left}

    def announcement(self) -> str | None:
        """The forecast in plain words, once, when calibration is over."""
        if self.counted != 1 + CALIBRATION or self.left is None:
            return None
        usual = by_phase(self.steps)
        # Reports come first in time, as those of the step before.
        names = sorted(filter(lambda name: _is_worth_a_word(name, usual), usual), key="report".__eq__)
        phases = ", ".join(f"{name} {figure(usual[name])}" for name in names)
        memory = f", peak memory {size(self.peak)}" if self.peak else ""
        return f"about {figure(per_step(usual))} s a step ({phases}), {duration(self.left)} left{memory}"

    def _look_at_memory(self) -> None:
        # Which pages are shared takes the system tens of milliseconds per GiB to tell, a high-water mark nothing.
        highest = _highest_bytes()
        if highest > 1.01 * self.highest:
            self.peak, self.highest = max(self.peak, peak_bytes() or 0), highest

    def _seconds_left(self, step: int, usual: Mapping[str, float]) -> float:
        evaluation = 0.0
        if self.evaluations:
            evaluation = typical(self.evaluations)
        elif self.held_out:  # a resumed attempt has not seen one yet
            drawn = usual.get("generate", 0.0) + usual.get("score", 0.0)
            evaluation = drawn * self.held_out / self.batch
        save = max(0.0, usual.get(SAVE, 0.0) - usual.get("report", 0.0))
        checkpoints = checkpoints_after(step, self.total_steps, self.save_every)
        return (self.total_steps - step) * per_step(usual) + checkpoints * (evaluation + save)


def typical(values: Iterable[float]) -> float:
    """The mean without the extremes on both sides: one of three, three of twenty.

    Not the median: with few prompts in a step the update has two durations, nearly none where the group gave no
    signal, and what counts for the time to come is how often each happens.
    """
    ordered = sorted(values)
    cut = (len(ordered) + 5) // 8 if len(ordered) > 2 else 0
    return fmean(ordered[cut : len(ordered) - cut])


def by_phase(steps: Sequence[StepSeconds]) -> dict[str, float]:
    """Seconds that each phase typically takes. Scoring is looked at since the rewards last changed."""
    names = dict.fromkeys(name for step in steps for name in step.phases if name not in NOT_OF_A_STEP)
    revision = steps[-1].revision
    usual = {}
    for name in names:
        values = [
            step.phases[name]
            for step in steps
            if name in step.phases and (name != "score" or step.revision == revision)
        ]
        if values:
            usual[name] = typical(values)
    return usual


def per_step(usual: Mapping[str, float]) -> float:
    """Seconds of a step without evaluation and checkpoint."""
    return sum(seconds for name, seconds in usual.items() if name != SAVE)


def checkpoints_after(step: int, total_steps: int, save_every: int) -> int:
    """Every `save_every` steps and at the last one."""
    last = step < total_steps and total_steps % save_every != 0
    return total_steps // save_every - step // save_every + last


def peak_bytes() -> int | None:
    """The most memory that the ranks of this job have held: of all their GPUs, or in the machine's memory.

    There it is the sum over this process and its workers, pages that they share counted once: of each its present
    share (PSS) and what it has given back since its own peak. None where the system does not tell (not Linux).
    """
    if torch.cuda.is_available():
        return _highest_bytes()
    try:
        return sum(_peak_of(rank) for rank in _ranks())
    except (OSError, KeyError):
        return None


def _highest_bytes() -> int:
    """The ranks' high-water marks, what they share counted for each of them; 0 where the system does not tell."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    try:
        return sum(_kib(Path(f"/proc/{rank}/status"))["VmHWM"] for rank in _ranks()) * 1024
    except (OSError, KeyError):
        return 0


def _ranks() -> list[int]:
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def _peak_of(process: int) -> int:
    now = _kib(Path(f"/proc/{process}/smaps_rollup"))
    highest = _kib(Path(f"/proc/{process}/status"))["VmHWM"]
    return (now["Pss"] + max(0, highest - now["Rss"])) * 1024


def _kib(file: Path) -> dict[str, int]:
    """Its lines of the form `Name:  123 kB`."""
    words = (line.split() for line in file.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in words if len(line) == 3 and line[2] == "kB"}


def _is_worth_a_word(name: str, usual: Mapping[str, float]) -> bool:
    return name != SAVE and usual[name] >= 0.02 * per_step(usual)
