"""kill -9 of the job, the dispatcher and the server, at three points each: nothing that was acknowledged is lost.

Every run must end with the adapter, metrics and completions of the run that nobody disturbed, bit for bit: first step
to last, each exactly once.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from processes import Server, job_process, wait_until

from rewardsmith import GRPOConfig, Rewardsmith, SamplingParamsConfig
from rewardsmith.demo import countdown

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY, BATCH = 10, 3, 32
CONFIG = GRPOConfig(
    base_model="countdown-tiny",
    reward_fns={"format": countdown.format_reward, "equation": countdown.equation_reward},
    train_steps=STEPS,
    save_every=SAVE_EVERY,
    learning_rate=1e-3,
    rank=4,
    lora_alpha=8,
    beta=0.0,
    effective_batch_size=BATCH,
    num_generations=8,
    sampling_params=SamplingParamsConfig(max_tokens=48),
    enable_early_stopping=False,
    seed=7,
)
# What a killed process may repeat or wait for is not part of the result.
TIMINGS = ("seconds/", "tokens_per_second", "forecast/", "memory/")


def submit(rs: Rewardsmith, folder: Path) -> str:
    rows = countdown.rows("train", 64, seed=1) + countdown.rows("held_out", 16, seed=1)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rs.datasets.from_file(path, name="rows")
    rs.repos.create(name="faults", exists_ok=True)
    return rs.finetuning.jobs.create(config=CONFIG, dataset="rows", repo="faults").uuid


def outcome(rs: Rewardsmith, uuid: str) -> dict:
    """All of a finished run that must not depend on what happened to its processes."""
    job = rs.finetuning.jobs.get(uuid)
    assert (job.status, job.error) == ("completed", None)
    series = {
        name: [(point.step, point.value) for point in points]
        for name, points in rs.finetuning.jobs.metrics(uuid).items()
        if not name.startswith(TIMINGS) and "seconds" not in name
    }
    assert [step for step, _ in series["total_reward"]] == list(range(1, STEPS + 1))
    rows = [
        (c.phase, c.step, c.idx, c.prompt, c.completion, c.total_reward)
        for c in rs.finetuning.jobs.completions(uuid, order="oldest")
    ]
    assert len(rows) == len(set(row[:3] for row in rows))
    assert sum(row[0] == "train" for row in rows) == STEPS * BATCH
    checkpoints = rs.adapters.get(job.adapter_id).checkpoints
    return {
        "series": series,
        "completions": sorted(rows),
        "checkpoints": [(c.checkpoint, c.step, c.fingerprint) for c in checkpoints],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    with Server(folder / "home") as server:
        uuid = submit(server.client(), folder)
        wait_for_end(server.client(), uuid)
        return outcome(server.client(), uuid)


def wait_for_end(rs: Rewardsmith, uuid: str) -> None:
    wait_until(lambda: rs.finetuning.jobs.get(uuid).status in ("completed", "errored"), "the job ends", seconds=240)


def wait_for_step(rs: Rewardsmith, uuid: str, step: int) -> None:
    wait_until(lambda: rs.finetuning.jobs.get(uuid).step >= step, f"step {step}", seconds=240)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", f"{pid} is dead")


# While it starts; in the steps before the first checkpoint; after it.
POINTS: list[Callable[[Rewardsmith, str], None]] = [
    lambda rs, uuid: wait_until(lambda: rs.finetuning.jobs.get(uuid).status == "training", "the job starts"),
    lambda rs, uuid: wait_for_step(rs, uuid, SAVE_EVERY - 1),
    lambda rs, uuid: wait_for_step(rs, uuid, 2 * SAVE_EVERY + 1),
]


def test_a_job_killed_three_times_ends_with_the_same_numbers(tmp_path: Path, undisturbed: dict):
    with Server(tmp_path / "home") as server:
        rs = server.client()
        uuid = submit(rs, tmp_path)
        for reached in POINTS:
            reached(rs, uuid)
            victim = wait_until(lambda: job_process(server.home), "a job process")
            kill(victim.pid)
            wait_until(lambda: (p := job_process(server.home)) and p.pid != victim.pid, "the next attempt")  # noqa: B023
        wait_for_end(rs, uuid)
        assert outcome(rs, uuid) == undisturbed
        restarts = [event for event in rs.finetuning.jobs.events(uuid) if event.kind == "restarted"]
        assert len(restarts) == 3


def test_a_job_goes_on_while_its_server_is_killed_three_times(tmp_path: Path, undisturbed: dict):
    with Server(tmp_path / "home") as server:
        rs = server.client()
        uuid = submit(rs, tmp_path)
        wait_until(lambda: job_process(server.home), "the job process")
        worker = job_process(server.home)
        for reached in POINTS:
            reached(rs, uuid)
            acknowledged = rs.finetuning.jobs.get(uuid).step
            server.kill()
            assert worker.is_running()
            server.start()
            assert rs.finetuning.jobs.get(uuid).step >= acknowledged
        wait_for_end(rs, uuid)
        assert outcome(rs, uuid) == undisturbed
        assert rs.finetuning.jobs.get(uuid).attempt == 1, "the job was not restarted: it went on"


def test_a_job_goes_on_while_its_dispatcher_is_killed_three_times(tmp_path: Path, undisturbed: dict):
    with Server(tmp_path / "home", dispatcher=False) as server:
        rs = server.client()
        dispatcher = server.start_dispatcher()
        uuid = submit(rs, tmp_path)
        for reached in POINTS:
            reached(rs, uuid)
            kill(dispatcher.pid)
            dispatcher.wait()
            dispatcher = server.start_dispatcher()
        wait_for_end(rs, uuid)
        assert outcome(rs, uuid) == undisturbed
        assert rs.finetuning.jobs.get(uuid).attempt == 1


def test_ctrl_c_leaves_nothing_and_the_next_start_goes_on(tmp_path: Path, undisturbed: dict):
    with Server(tmp_path / "home") as server:
        rs = server.client()
        uuid = submit(rs, tmp_path)
        wait_for_step(rs, uuid, SAVE_EVERY + 1)
        family = psutil.Process(server.pid).children(recursive=True)
        assert any("rewardsmith" in " ".join(p.cmdline()) for p in family)
        server.stop(signal.SIGINT)
        assert not [p for p in family if p.is_running() and p.status() != "zombie"]
        server.start()
        wait_for_end(rs, uuid)
        assert outcome(rs, uuid) == undisturbed
