"""Things the store's tests put into it: datasets, jobs, reports, and segments as a job process writes them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rewardsmith import wire
from rewardsmith.store import Claim, Store
from rewardsmith.train.segments import COMPLETIONS, REWARD_LOGS

OWNER_ID = 1
LEASE = 60.0


def open_store(folder: Path) -> Store:
    url = f"sqlite:///{folder / 'db' / 'rewardsmith.sqlite'}"
    return Store(url, (folder / "artifacts").as_uri(), key_file=folder / "secrets.key")


def upload(store: Store, name: str, content: bytes, file_name: str = "rows.jsonl") -> wire.Dataset:
    token = store.datasets.begin_upload(file_name, OWNER_ID)
    receive(store, token, content)
    return store.datasets.finish_upload(name, token, OWNER_ID)


def receive(store: Store, token: str, content: bytes) -> None:
    """What the presigned URL does with a body."""
    file = store.datasets.receive_upload(token)
    file.write(content)
    store.datasets.complete_upload(token, file)


def function(name: str = "exact", source: str = "def exact(p, c, e):\n    return 1.0\n") -> wire.RevisionFunction:
    return wire.RevisionFunction(name=name, source=source, source_sha256=hashlib.sha256(source.encode()).hexdigest())


def params(source: str = "one") -> dict[str, Any]:
    return {"rank": 8, "rewardFns": {"functions": {"exact": {"encodedFn": source}}}}


def create_job(store: Store, repo: str = "math", dataset: str = "rows", **changes: Any) -> wire.Job:
    """A queued job; its repo and dataset are made when they are not there."""
    store.registry.create_repo(repo, None, True, OWNER_ID)
    if dataset not in [known.name for known in store.datasets.list()]:
        upload(store, dataset, b'{"prompt": "1+1="}\n')
    request: dict[str, Any] = {
        "user_id": OWNER_ID,
        "repo": repo,
        "dataset": dataset,
        "base_model": "tiny",
        "base_model_source": "owner/tiny",
        "params": params(),
        "functions": [function()],
    }
    return store.runs.create_job(**(request | changes))


def claim(store: Store) -> Claim:
    claimed = store.runs.claim("host", LEASE)
    assert claimed is not None
    return claimed


def step_report(claimed: Claim, step: int, **changes: Any) -> wire.StepReport:
    report: dict[str, Any] = {
        "fence": claimed.fence,
        "step": step,
        "epoch": step / 10,
        "total_steps": 100,
        "steps_per_epoch": 10,
        "revision": 1,
        "metrics": {"total_reward": step / 100, "loss": 1.0 / (step + 1)},
    }
    return wire.StepReport(**(report | changes))


def report_step(store: Store, claimed: Claim, step: int, **changes: Any) -> wire.Control:
    return store.runs.report_step(claimed.uuid, step_report(claimed, step, **changes), LEASE)


def report_checkpoint(store: Store, claimed: Claim, number: int, step: int, **changes: Any) -> wire.Control:
    report: dict[str, Any] = {
        "fence": claimed.fence,
        "checkpoint": number,
        "step": step,
        "path": f"jobs/{claimed.uuid}/checkpoints/{number}-step-{step}",
        "state_path": f"jobs/{claimed.uuid}/states/{number}-step-{step}",
        "fingerprint": f"fingerprint-{step}",
    }
    return store.runs.report_checkpoint(claimed.uuid, wire.CheckpointReport(**(report | changes)), LEASE)


def finish(store: Store, claimed: Claim, status: str = "completed", **fields: Any) -> wire.Control:
    return store.runs.finish(claimed.uuid, wire.Finish(fence=claimed.fence, status=status, **fields), LEASE)


def completion(step: int, idx: int, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "idx": idx,
        "epoch": step / 10,
        "phase": "train",
        "row": idx // 4,
        "sample": idx % 4,
        "prompt": f"prompt {idx // 4}",
        "completion": f"answer {step}.{idx}",
        "total_reward": idx / 10,
        "advantage": 0.0,
        "finish_reason": "stop",
        "tokens": 3,
        "revision": 1,
        "policy_version": step,
        "scores": {"exact": {"value": idx / 10, "outcome": "ok", "seconds": 0.01}},
    }
    return row | changes


def reward_log(step: int, idx: int, function: str = "exact", **changes: Any) -> dict[str, Any]:
    row = {name: value for name, value in completion(step, idx).items() if name in REWARD_LOGS.names}
    row |= {
        "function": function,
        "outcome": "ok",
        "value": 1.0,
        "seconds": 0.01,
        "prints": f"{step}.{idx}",
        "error": "",
    }
    return row | changes


def write_segment(
    store: Store, uuid: str, rows: list[dict[str, Any]], *, family: str = "completions", name: str = ""
) -> wire.Segment:
    """A Parquet file as a job process writes it, and the manifest row that its report has."""
    step, phase = rows[0]["step"], rows[0]["phase"]
    path = f"jobs/{uuid}/segments/{family}-{phase}-{step}{name}.parquet"
    file = store.artifacts.local_path(path)
    assert file is not None
    file.parent.mkdir(parents=True, exist_ok=True)
    if family == "completions":
        rows = [row | {"scores": list(row["scores"].items())} for row in rows]
    schema = COMPLETIONS if family == "completions" else REWARD_LOGS
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
    content = file.read_bytes()
    return wire.Segment(
        family=family,
        phase=phase,
        step=step,
        rows=len(rows),
        bytes=len(content),
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
    )
