"""Runs a whole job attempt in this process: files in a folder, journal to a scripted server, everything else real."""

from __future__ import annotations

import hashlib
import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from scripted_server import TOKEN, ScriptedServer

from rewardsmith.config import GRPOConfig
from rewardsmith.jobs.entry import run_job
from rewardsmith.train.parallel.ranks import Ranks
from rewardsmith.wire import JobSpec, ResumePoint, Revision, RevisionFunction

UUID = "0b7c7f0e-1111-4222-8333-444455556666"
DATASET = "datasets/rows.jsonl"
LONG = 1000  # steps of a run that is ended by the test

LETTER_A = "def letter_a(prompt, completion, example):\n    return completion.count('a') / 8\n"
LENGTH = "def length(prompt, completion, example):\n    return len(completion) / 16\n"


def revision(number: int = 1, **sources: str) -> Revision:
    return Revision(
        revision=number,
        created_at=datetime.now(UTC),
        created_by="tester",
        functions=[function(name, source) for name, source in sources.items()],
    )


def function(name: str, source: str, **settings: Any) -> RevisionFunction:
    return RevisionFunction(
        name=name, source=source, source_sha256=hashlib.sha256(source.encode()).hexdigest(), **settings
    )


def config(**changes: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "train_steps": 4,
        "save_every": 2,
        "learning_rate": 1e-2,
        "rank": 4,
        "lora_alpha": 8,
        "beta": 0.0,
        "effective_batch_size": 8,
        "num_generations": 4,
        "sampling_params": {"max_tokens": 8},
        "enable_early_stopping": False,
        "seed": 3,
    }
    return GRPOConfig(**settings | changes)


def rows(train: int = 6, held_out: int = 0) -> list[dict[str, Any]]:
    texts = ["say", "a word", "letters please", "ab", "count to b", "go on", "begin", "again", "more", "end"]
    made = [{"prompt": texts[i % len(texts)], "n": i, "split": "train"} for i in range(train)]
    return made + [{"prompt": texts[-1 - i % 5], "n": -i, "split": "evaluation"} for i in range(held_out)]


def write_rows(folder: Path, content: list[dict[str, Any]]) -> None:
    path = folder / DATASET
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


def spec(
    folder: Path,
    model: Path,
    job: GRPOConfig,
    *,
    fence: int = 1,
    first: Revision | None = None,
    resume: ResumePoint | None = None,
    **fields: Any,
) -> JobSpec:
    return JobSpec(
        uuid=UUID,
        fence=fence,
        attempt=fence,
        params=job.model_dump(mode="json", by_alias=True),
        base_model_source=str(model),
        repo="repo",
        version=1,
        artifacts_url=folder.as_uri(),
        dataset_path=DATASET,
        resume=resume,
        revision=first or revision(letter_a=LETTER_A),
        **fields,
    )


def run(server: ScriptedServer, asked_to_yield: threading.Event | None = None, workers: int = 0) -> int:
    """The exit status of the attempt that the server's spec describes."""
    assert server.spec is not None
    ticket = {"url": server.url, "uuid": UUID, "fence": server.spec.fence, "token": TOKEN}
    with Ranks(workers) as ranks:
        return run_job(ticket, asked_to_yield or threading.Event(), ranks)


def series(server: ScriptedServer, name: str) -> dict[int, float]:
    return {body["step"]: body["metrics"][name] for body in server.bodies("report") if name in body["metrics"]}


def segment_rows(folder: Path, server: ScriptedServer, family: str, phase: str = "train") -> list[dict[str, Any]]:
    """Rows of all segments that were reported, after a check of their hashes."""
    found = []
    for body in server.bodies("report"):
        for segment in body["segments"]:
            content = (folder / segment["path"]).read_bytes()
            assert (hashlib.sha256(content).hexdigest(), len(content)) == (segment["sha256"], segment["bytes"])
            if (segment["family"], segment["phase"]) == (family, phase):
                table = pq.read_table(folder / segment["path"])
                assert table.num_rows == segment["rows"]
                found += table.to_pylist()
    return found


def finish(server: ScriptedServer) -> dict[str, Any]:
    (body,) = server.bodies("finish")
    return body


def events(server: ScriptedServer, kind: str) -> list[str]:
    return [body["message"] for body in server.bodies("event") if body["kind"] == kind]


def at_step(number: int, act) -> Any:
    """A server's `on_report` that acts when the report of a step comes in, before it is answered."""

    def on_report(path: str, body: dict[str, Any]) -> None:
        if path == "report" and body["step"] == number:
            act()

    return on_report
