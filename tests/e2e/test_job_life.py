"""What a user does with jobs besides waiting for them: mend a failing reward, go on from a version, cancel."""

import json
from pathlib import Path

import pytest
from processes import Server, wait_until

from rewardsmith import FinetuningError, GRPOConfig, RequestError, Rewardsmith, SamplingParamsConfig
from rewardsmith.demo import countdown

pytestmark = pytest.mark.slow


def config(**changes) -> GRPOConfig:
    fields = {
        "base_model": "countdown-tiny",
        "reward_fns": {"format": countdown.format_reward},
        "train_steps": 3,
        "learning_rate": 1e-3,
        "effective_batch_size": 32,
        "num_generations": 8,
        "rank": 4,
        "beta": 0.0,
        "sampling_params": SamplingParamsConfig(max_tokens=32),
    }
    return GRPOConfig(**fields | changes)


@pytest.fixture(scope="module")
def rs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Rewardsmith:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in countdown.rows("train", 64)))
    client = server.client()
    client.datasets.from_file(rows, name="rows")
    client.repos.create(name="life")
    return client


def test_a_failing_reward_pauses_the_job_until_it_is_mended(rs: Rewardsmith):
    def typo(prompt, completion, example):
        return float(example["tagret"])

    job = rs.finetuning.jobs.create(
        config=config(reward_fns={"typo": typo}, train_steps=200), dataset="rows", repo="life"
    )
    paused = wait_until(lambda: (now := rs.finetuning.jobs.get(job)).paused_reason and now, "the job pauses", 120)
    assert paused.status == "training"
    assert "typo" in paused.paused_reason and "KeyError" in paused.paused_reason, paused.paused_reason
    failed = next(rs.finetuning.jobs.reward_logs(job, outcome="exception"))
    assert "KeyError: 'tagret'" in failed.error and 'example["tagret"]' in failed.error
    assert rs.finetuning.jobs.metrics(job)["reward/typo/error_rate"][0].value == 1.0

    mended = rs.adapters.get_config(job.adapter_id)
    mended.reward_fns["typo"] = countdown.format_reward
    rs.adapters.update_config(job.adapter_id, mended)
    step = paused.step
    now = wait_until(lambda: (now := rs.finetuning.jobs.get(job)).step > step and now, "the job goes on", 120)
    assert now.paused_reason is None
    rs.finetuning.jobs.cancel(job)
    wait_until(lambda: rs.finetuning.jobs.get(job).status == "canceled", "the job is canceled", 60)


def test_a_run_goes_on_from_the_adapter_of_another(rs: Rewardsmith):
    first = rs.adapters.create(config=config(), dataset="rows", repo="life")
    second = rs.adapters.create(config=GRPOConfig(train_steps=2), continue_from_version=first.name, repo="life")
    assert second.tag == first.tag + 1 and second.base_model == "countdown-tiny"
    job = rs.finetuning.jobs.get(second.name)
    assert (job.step, job.params.rank, job.params.learning_rate, job.dataset) == (2, 4, 1e-3, "rows")
    # At a learning rate too small to move anything, the copy is the adapter that it continues.
    still = rs.adapters.create(
        config=GRPOConfig(train_steps=1, learning_rate=1e-30), continue_from_version=first.name, repo="life"
    )
    assert still.checkpoints[-1].fingerprint == first.checkpoints[-1].fingerprint != second.checkpoints[-1].fingerprint
    with pytest.raises(RequestError, match="rank"):
        rs.adapters.create(config=GRPOConfig(rank=8), continue_from_version=first.name, repo="life")


def test_a_job_that_cannot_run_says_why(rs: Rewardsmith, tmp_path: Path):
    folder = tmp_path / "no-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(FinetuningError, match="no-model"):
        rs.adapters.create(config=config(base_model=str(folder)), dataset="rows", repo="life")
    with pytest.raises(RequestError, match="did you mean 'countdown-tiny'"):
        rs.adapters.create(config=config(base_model="countdown-tinny"), dataset="rows", repo="life")
    with pytest.raises(RequestError, match="no dataset"):
        rs.adapters.create(config=config(), dataset="rowz", repo="life")


def test_the_example_of_the_readme_runs(server: Server, tmp_path: Path):
    import subprocess
    import sys

    from processes import environment

    example = Path(__file__).parents[2] / "examples" / "countdown.py"
    done = subprocess.run(
        [sys.executable, str(example), "2"],
        cwd=tmp_path,
        env=environment(server.home) | {"REWARDSMITH_BASE_URL": server.url},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "countdown-adapter.zip").stat().st_size > 1000
