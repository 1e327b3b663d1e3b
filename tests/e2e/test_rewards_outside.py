"""Whole jobs whose rewards need something from outside: a judge with its key, packages from an index."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import Judge
from processes import Server, environment, wait_until
from test_job_life import config
from wheels import Index, serving

from rewardsmith import (
    FinetuningError,
    RewardFunctionsConfig,
    RewardFunctionsRuntimeConfig,
    Rewardsmith,
)
from rewardsmith.demo import countdown
from rewardsmith.rewards.sandbox import probe
from rewardsmith.rewards.sandbox.tiers import Tier

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "llm_judge.py"
KEY = "sk-7f3a-very-secret"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    (tmp_path / "index").mkdir()
    with serving(tmp_path / "index") as served:
        monkeypatch.setenv("UV_DEFAULT_INDEX", served.url)
        yield served


def prepared(server: Server) -> Rewardsmith:
    rows = server.home.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in countdown.rows("train", 64)))
    client = server.client()
    client.datasets.from_file(rows, name="rows")
    client.repos.create(name="outside")
    return client


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(Tier[probe.report().tier] < Tier.S2, reason="network needs a sandbox of tier S2")
def test_the_judge_example_asks_its_judge_and_tells_its_key_to_nobody_else(tmp_path: Path):
    with Judge() as judge:
        endpoint = f"localhost:{judge.server_port}"
        with Server(tmp_path / "home", "--private-endpoint", endpoint) as server:
            settings = {"REWARDSMITH_BASE_URL": server.url, "JUDGE_API_KEY": KEY}
            done = subprocess.run(
                [sys.executable, str(EXAMPLE), f"http://{endpoint}/v1", "judge-1", "1"],
                cwd=tmp_path,
                env=environment(server.home) | settings,
                capture_output=True,
                text=True,
                timeout=200,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            rs = server.client()
            (job,) = rs.finetuning.jobs.list()
            assert rs.finetuning.jobs.metrics(job)["reward/judge/mean"][0].value == pytest.approx(0.7)
            assert job.params.secrets["JUDGE_API_KEY"] == "secret:JUDGE_API_KEY"
            assert rs.secrets.get("JUDGE_API_KEY") == KEY
    assert len(judge.requests) >= 32
    assert {headers["Authorization"] for _, headers, _ in judge.requests} == {f"Bearer {KEY}"}
    assert KEY not in done.stdout + done.stderr + server.log
    assert KEY.encode() not in everything_in(server.home)


def needing(package: str, **functions: object) -> RewardFunctionsConfig:
    return RewardFunctionsConfig(functions=functions, runtime=RewardFunctionsRuntimeConfig(packages=[package]))


def tiny(prompt, completion, example):
    import rs_tiny

    return float(rs_tiny.version)


def test_packages_are_installed_before_the_first_step_and_change_with_the_functions(index: Index, tmp_path: Path):
    index.add("rs_tiny", "1.0")
    with Server(tmp_path / "home") as server:
        rs = prepared(server)
        jobs = rs.finetuning.jobs
        with pytest.raises(FinetuningError, match="rs-nowhere"):
            wanted = config(reward_fns=needing("rs-nowhere", tiny=tiny))
            rs.adapters.create(config=wanted, dataset="rows", repo="outside")
        assert jobs.list()[0].step == 0

        fields = {"reward_fns": needing("rs-tiny", tiny=tiny), "train_steps": 500}
        job = jobs.create(config=config(**fields), dataset="rows", repo="outside")
        wait_until(lambda: jobs.get(job).step >= 1, "the first step", 120)
        assert any("rs-tiny 1.0" in event.message.replace("_", "-") for event in jobs.events(job))
        assert "packages: " in jobs.log(job)
        assert jobs.metrics(job)["reward/tiny/mean"][0].value == 1.0

        index.add("rs_tiny", "2.0")
        changed = rs.adapters.get_config(job.adapter_id)
        changed.reward_fns.runtime = RewardFunctionsRuntimeConfig(packages=["rs-tiny>=2"])
        rs.adapters.update_config(job.adapter_id, changed)
        wait_until(lambda: jobs.metrics(job)["reward/tiny/mean"][-1].value == 2.0, "the new packages", 120)
        changed.reward_fns.runtime = RewardFunctionsRuntimeConfig(packages=["rs-tiny>=3"])
        rs.adapters.update_config(job.adapter_id, changed)
        refused = wait_until(lambda: jobs.revisions(job)[-1].refused, "the set that cannot be had is refused", 120)
        assert "rs-tiny" in refused
        step = jobs.get(job).step
        wait_until(lambda: jobs.get(job).step > step, "the job goes on", 120)
        assert jobs.metrics(job)["reward/tiny/mean"][-1].value == 2.0
        jobs.cancel(job)
    assert "UV_DEFAULT_INDEX" in os.environ
