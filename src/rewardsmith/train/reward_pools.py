"""Makes the reward pools of a job: with its secrets, its endpoints, and the packages that a revision names.

Packages are installed in a thread of their own, while the model is loaded or the revision before goes on training. What
was found for a set of packages is kept with the job's files, so that every later attempt has the very same versions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from rewardsmith.errors import PackageError
from rewardsmith.reward_config import RewardFunctionsRuntimeConfig
from rewardsmith.rewards import packages
from rewardsmith.rewards.grants import Grants
from rewardsmith.rewards.packages import Environment
from rewardsmith.rewards.pool import RewardPool
from rewardsmith.rewards.redact import shown_after_all
from rewardsmith.train.artifacts import JobArtifacts
from rewardsmith.train.journal import Journal
from rewardsmith.wire import JobSpec, Revision

log = logging.getLogger("rewardsmith.train")

FOLDER = "packages"  # of a job's artifacts
LOOK_SECONDS = 0.2  # between two looks whether the job was canceled


class RewardPools:
    """`close` it when no pool of it is used any more."""

    def __init__(self, spec: JobSpec, artifacts: JobArtifacts, journal: Journal) -> None:
        self._grants = Grants(spec.secrets, spec.private_endpoints)
        self._artifacts = artifacts
        self._journal = journal
        self._installer = ThreadPoolExecutor(1, thread_name_prefix="packages")
        self._environments: dict[tuple[str, ...], Future[Environment]] = {}
        self._announced: set[tuple[str, ...]] = set()
        self._stopped = False

    def remarks(self) -> Iterator[str]:
        """What the user should know of the secrets."""
        for name in shown_after_all(self._grants.secrets):
            yield f"the secret {name} is so short that it is not taken out of logs: it would be found everywhere"

    def ready(self, revision: Revision) -> bool:
        """Whether its packages are there, or cannot be had; when first asked for, they begin to be installed."""
        coming = self._environment_of(revision)
        wait([coming], LOOK_SECONDS)  # what has been installed before is there at once
        return coming.done()

    def make(self, revision: Revision, workers: int | None = None) -> RewardPool:
        """The pool for its functions, not started; on all cores when not said. Waits for its packages.

        Raises PackageError when they cannot be installed, and what ends a job meanwhile.
        """
        coming, lines = self._environment_of(revision), _lines_of(revision)
        while not coming.done():
            self._journal.check()
            wait([coming], LOOK_SECONDS)
        try:
            environment = coming.result()
        except BaseException:
            del self._environments[lines]  # another revision may try again
            raise
        if environment.lock and lines not in self._announced:
            self._announced.add(lines)
            self._journal.event("info", f"packages for the reward functions: {', '.join(environment.versions)}")
        return RewardPool(
            revision.functions,
            workers=workers,
            runtime=revision.runtime,
            site_dirs=environment.folders,
            grants=self._grants,
        )

    def close(self) -> None:
        self._stopped = True
        self._installer.shutdown(cancel_futures=True)
        for coming in self._environments.values():
            if not coming.cancelled() and coming.exception() is None:
                coming.result().close()

    def _environment_of(self, revision: Revision) -> Future[Environment]:
        lines = _lines_of(revision)
        if lines not in self._environments:
            self._environments[lines] = self._installer.submit(self._open, lines)
        return self._environments[lines]

    def _open(self, lines: tuple[str, ...]) -> Environment:
        """In the installer's thread."""
        name = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        kept = next((path for path in self._artifacts.list(FOLDER) if f"/{name}-" in path), None)
        lock = self._artifacts.get(kept).decode() if kept else ""
        environment = packages.open_environment(lines, self._tell, lock)
        if environment.lock and not kept:
            self._artifacts.put(self._artifacts.path(FOLDER, name, ".lock"), environment.lock.encode())
        return environment

    def _tell(self, line: str) -> None:
        if line:
            log.info("packages: %s", line)
        if self._stopped:
            raise PackageError("the job has ended")


def _lines_of(revision: Revision) -> tuple[str, ...]:
    return tuple(RewardFunctionsRuntimeConfig(**revision.runtime).packages)
