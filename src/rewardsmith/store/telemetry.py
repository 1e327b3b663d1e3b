"""Metrics of a job and the manifest of its segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rewardsmith import wire
from rewardsmith.store.database import Database


@dataclass(frozen=True)
class StepRecord:
    """One committed report. Step 0 has held-out metrics only."""

    step: int
    epoch: float
    revision: int
    at: datetime
    metrics: dict[str, float]


class Telemetry:
    def __init__(self, database: Database) -> None:
        self._database = database

    def steps(self, uuid: str, after_step: int = -1, limit: int = 1000) -> list[StepRecord]:
        """Whole reports in step order, for streams. Raises NotFound."""
        raise NotImplementedError

    def metrics(
        self, uuid: str, series: Sequence[str] | None = None, after_step: int = -1
    ) -> dict[str, list[wire.MetricPoint]]:
        """Points by series name, in step order; `series` None means all. Raises NotFound."""
        raise NotImplementedError

    def segments(self, uuid: str) -> list[wire.Segment]:
        """The manifest, oldest step first: a file that is not in it does not exist for readers. Raises NotFound."""
        raise NotImplementedError
