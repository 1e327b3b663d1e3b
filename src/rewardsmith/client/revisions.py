"""Revisions of a job's reward functions: list, compare, try, apply, go back.

A job is named as in `finetuning.jobs`: by uuid, as an object, or by the adapter id that it fills. A change names what
is to be different, all else stays: `functions` (in any form that GRPOConfig takes) are added or take the place of those
of the same name, `remove` takes functions out, `weights` has a number or a schedule `{step: weight}` by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewardsmith import wire
from rewardsmith.client.jobs import JobRef, Jobs
from rewardsmith.client.transport import Transport
from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ConfigError

Weight = float | Mapping[int, float]


class Revisions:
    """`rs.revisions`."""

    def __init__(self, transport: Transport, jobs: Jobs) -> None:
        self._http = transport
        self._jobs = jobs

    def list(self, job: JobRef) -> list[wire.Revision]:
        """Every set of reward functions the job has had, oldest first."""
        return self._jobs.revisions(job)

    def get(self, job: JobRef, revision: int) -> wire.Revision:
        return self._http.get(f"{self._path(job)}/{revision}", wire.Revision)

    def diff(self, job: JobRef, revision: int, against: int | None = None) -> wire.RevisionDiff:
        """What a revision changed: against the one that was in effect before it, or any other."""
        return self._http.get(f"{self._path(job)}/{revision}/diff", wire.RevisionDiff, {"against": against})

    def dry_run(
        self,
        job: JobRef,
        functions: object = None,
        *,
        remove: Sequence[str] = (),
        weights: Mapping[str, Weight] | None = None,
        steps: int | None = None,
        completions: int | None = None,
        rows: Sequence[int] = (),
        rescore: bool = False,
    ) -> wire.DryRun:
        """Try a change on completions that the job has stored: whole steps, the newest first. Nothing changes by it.

        As many as `steps`, or as it takes for `completions` of them (256), and the newest ones of the dataset `rows`
        with these indices. It runs on the server and takes a minute or so at most. Old scores come from the store;
        `rescore` runs the present functions again beside the new ones.

        Raises ConfigError or RewardSourceError before anything is sent, RequestError when the server refuses.
        """
        if steps is not None and completions is not None:
            raise ConfigError("steps and completions both say how much to look at; give one of them")
        body = {**_change(functions, remove, weights), "steps": steps, "rows": [*rows], "rescore": rescore}
        if completions is not None:
            body["completions"] = completions
        return self._http.call("POST", f"{self._path(job)}/dry-run", wire.DryRun, body=body)

    def apply(
        self,
        job: JobRef,
        functions: object = None,
        *,
        remove: Sequence[str] = (),
        weights: Mapping[str, Weight] | None = None,
        note: str | None = None,
        compared_steps: int | None = None,
    ) -> wire.Revision:
        """Change the reward functions of a running job. They score from one of the next steps on, whole groups.

        For `compared_steps` steps (20; 0 where they may call a service) the functions that this changes or takes out
        go on being scored, with weight 0, as `reward/<name>@<revision>/mean`. Gives the present revision when nothing
        differs. Raises as `dry_run`.
        """
        body = {**_change(functions, remove, weights), "note": note, "comparedSteps": compared_steps}
        # The same change a second time makes no second revision.
        return self._http.call("POST", self._path(job), wire.Revision, body=body, repeat=True)

    def rollback(self, job: JobRef, to: int, note: str | None = None) -> wire.Revision:
        """Make a new revision with the functions of an earlier one. Raises RequestError for one that was refused."""
        path = f"{self._path(job)}/{to}/rollback"
        return self._http.call("POST", path, wire.Revision, body={"note": note}, repeat=True)

    def _path(self, job: JobRef) -> str:
        return f"{self._jobs.path(job)}/revisions"


def _change(functions: object, remove: Sequence[str], weights: Mapping[str, Weight] | None) -> dict[str, Any]:
    """The part of a request that says what is to be different. Raises ConfigError for a change of nothing."""
    sent = GRPOConfig(reward_fns=functions).reward_fns.to_wire()
    change = {
        "functions": sent.get("functions", {}),
        "remove": [remove] if isinstance(remove, str) else [*remove],
        "weights": {name: dict(w) if isinstance(w, Mapping) else w for name, w in (weights or {}).items()},
        "runtime": sent.get("runtime", {}),
    }
    if not any(change.values()):
        raise ConfigError("nothing is to change: give functions, remove or weights")
    return change
