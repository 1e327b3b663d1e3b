"""Metrics of a job and the manifest of its segments, as committed by its reports (written in `reports.py`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select

from rewardsmith import wire
from rewardsmith.store import jobrows
from rewardsmith.store.database import Database
from rewardsmith.store.schema import metrics, segments, steps


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
        with self._database.read() as connection:
            job = jobrows.find(connection, uuid)
            page = select(steps).where(steps.c.job_id == job.id, steps.c.step > after_step)
            rows = connection.execute(page.order_by(steps.c.step).limit(limit)).all()
            values: dict[int, dict[str, float]] = defaultdict(dict)
            if rows:
                within = metrics.c.step.between(rows[0].step, rows[-1].step)
                for point in connection.execute(select(metrics).where(metrics.c.job_id == job.id, within)):
                    values[point.step][point.series] = point.value
        return [StepRecord(row.step, row.epoch, row.revision, row.at, values[row.step]) for row in rows]

    def metrics(
        self, uuid: str, series: Sequence[str] | None = None, after_step: int = -1
    ) -> dict[str, list[wire.MetricPoint]]:
        """Points by series name, in step order; `series` None means all. Raises NotFound."""
        with self._database.read() as connection:
            job = jobrows.find(connection, uuid)
            query = select(metrics).where(metrics.c.job_id == job.id, metrics.c.step > after_step)
            if series is not None:
                query = query.where(metrics.c.series.in_(series))
            points: dict[str, list[wire.MetricPoint]] = defaultdict(list)
            for row in connection.execute(query.order_by(metrics.c.step, metrics.c.series)):
                # A long run has 100,000s of points, and what comes from here needs no second check.
                points[row.series].append(wire.MetricPoint.model_construct(step=row.step, value=row.value))
        return dict(points)

    def segments(self, uuid: str) -> list[wire.Segment]:
        """The manifest, oldest step first: a file that is not in it does not exist for readers. Raises NotFound."""
        with self._database.read() as connection:
            job = jobrows.find(connection, uuid)
            query = select(segments).where(segments.c.job_id == job.id).order_by(segments.c.step, segments.c.path)
            names = wire.Segment.model_fields
            return [wire.Segment(**{name: row[name] for name in names}) for row in connection.execute(query).mappings()]
