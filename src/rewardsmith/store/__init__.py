"""Everything that writes SQL or files: one `Store` per process, its parts by name.

    registry      users, tokens, repos, adapter versions
    datasets      uploaded files, checked and kept as canonical JSON lines
    runs          jobs: queue, lease, fence, control, revisions, timeline
    telemetry     metrics and the manifest of segments
    completions   queries over the segments of a job
    secrets       values that users keep here, sealed, and those that a job's reward functions are given
    artifacts     the files themselves

A method is one transaction and returns wire models or small dataclasses. It raises NotFound, Conflict, Forbidden,
Unauthorized, ConfigError or DatasetError, whose messages are for people. Every path that goes in or out is relative
to the artifacts root, with `/` between plain names; what a job reports must have the job's uuid as one of its folders
(`jobs/<uuid>/segments/...`, `checkpoints`, `states`). Nothing here starts a process or speaks HTTP.
"""

from pathlib import Path

from rewardsmith.home import ServerConfig
from rewardsmith.store.artifacts import Artifacts
from rewardsmith.store.completions import Completions
from rewardsmith.store.database import Database
from rewardsmith.store.datasets import Datasets
from rewardsmith.store.jobqueue import Claim, LiveJob
from rewardsmith.store.registry import Identity, Registry
from rewardsmith.store.runs import Runs
from rewardsmith.store.seal import Seal
from rewardsmith.store.secrets import Secrets
from rewardsmith.store.telemetry import StepRecord, Telemetry

__all__ = ["Claim", "Identity", "LiveJob", "StepRecord", "Store"]


class Store:
    """Open database and files; safe to use from many threads. Opening brings the schema up to date.

    `key_file` holds the key of the secrets, and is made with the first one; without it there can be none.
    """

    def __init__(
        self,
        url: str,
        artifacts_url: str,
        *,
        max_dataset_bytes: int = ServerConfig.max_dataset_bytes,
        key_file: Path | None = None,
    ) -> None:
        self._database = Database(url)
        self._database.migrate()
        self.artifacts = Artifacts(artifacts_url)
        self.registry = Registry(self._database, self.artifacts)
        self.datasets = Datasets(self._database, self.artifacts, max_dataset_bytes)
        seal = Seal(key_file)
        self.secrets = Secrets(self._database, seal)
        self.runs = Runs(self._database, self.artifacts, seal)
        self.telemetry = Telemetry(self._database)
        self.completions = Completions(self._database, self.artifacts)

    def close(self) -> None:
        self._database.close()
