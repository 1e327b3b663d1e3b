"""The documented workflow of the original, run as its script, against a real server and the embedded model."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import Server, environment, wait_until

from rewardsmith.catalog import EMBEDDED
from rewardsmith.demo import countdown

SCRIPT = Path(__file__).parents[3] / "shared" / "acceptance" / "seed_job.py"
STEPS = 50


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.exists(), reason=f"the acceptance script is not at {SCRIPT}")
def test_the_documented_script_trains_changes_its_rewards_and_downloads(tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in countdown.rows("train", 200)))
    with Server(tmp_path / "home") as server:
        script = subprocess.Popen(
            [
                *(sys.executable, str(SCRIPT), "--base-model", "countdown-tiny", "--dataset", str(rows)),
                *("--steps", str(STEPS), "--update-at", "12"),
            ],
            cwd=tmp_path,
            env=environment(server.home) | {"RFT_SDK": "rewardsmith", "REWARDSMITH_BASE_URL": server.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        output, errors = script.communicate(timeout=280)
        assert script.returncode == 0, output + errors
        seen = json.loads(output.splitlines()[-1])
        assert seen["updated"] is True
        assert seen["zip_bytes"] > 1000

        rs = server.client()
        job = rs.finetuning.jobs.list()[0]
        assert (job.status, job.step, job.adapter_id) == ("completed", STEPS, seen["adapter"])
        assert rs.finetuning.jobs.metrics(job)["total_reward"][0].value > 0.5

        first, second = rs.finetuning.jobs.revisions(job)
        assert [f.name for f in second.functions] == ["format", "answer", "format_again"]
        assert first.effective_step == 1 and 1 < second.effective_step <= STEPS
        for completion in rs.finetuning.jobs.completions(job, phase="train"):
            expected = second if completion.step >= second.effective_step else first
            assert completion.revision == expected.revision
            assert list(completion.scores) == [f.name for f in expected.functions]

        archive = tmp_path / "adapter.zip"
        rs.adapters.download(seen["adapter"], dest=str(archive))
        with zipfile.ZipFile(archive) as zipped:
            zipped.extractall(tmp_path / "adapter")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED), tmp_path / "adapter")
        trained = [p for name, p in model.named_parameters() if "lora_B" in name]
        assert trained and all(p.abs().sum() > 0 for p in trained), "every LoRA module was trained and loaded"


@pytest.mark.slow
def test_a_running_job_takes_a_better_reward_and_refuses_a_broken_one(tmp_path: Path):
    from rewardsmith import GRPOConfig, RequestError, RewardFunction, SamplingParamsConfig

    def wants_the_tag(prompt, completion, example):
        return 1.0 if "</answer>" in completion else 0.0

    def wants_a_short_answer(prompt, completion, example):
        print("length", len(completion))
        return 1.0 / (1 + len(completion))

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in countdown.rows("train", 64)))
    with Server(tmp_path / "home") as server:
        rs = server.client()
        rs.datasets.from_file(rows, name="rows")
        rs.repos.create(name="live")
        config = GRPOConfig(
            base_model="countdown-tiny",
            reward_fns={"tag": wants_the_tag},
            train_steps=200,
            effective_batch_size=16,
            num_generations=8,
            rank=4,
            beta=0.0,
            sampling_params=SamplingParamsConfig(max_tokens=32),
        )
        job = rs.finetuning.jobs.create(config=config, dataset="rows", repo="live")
        wait_until(lambda: rs.finetuning.jobs.get(job).step >= 2, "step 2")

        broken = rs.adapters.get_config("live/1")
        broken.reward_fns["tag"] = RewardFunction(encoded_fn="ZGVmIGYocCwgYywgZSk6IHJldHVybiAoCg==")
        with pytest.raises(RequestError, match="line 1"):
            rs.adapters.update_config("live/1", broken)
        other = rs.adapters.get_config("live/1")
        other.learning_rate = 0.5
        with pytest.raises(RequestError, match="learning_rate"):
            rs.adapters.update_config("live/1", other)
        assert len(rs.finetuning.jobs.revisions(job)) == 1

        better = rs.adapters.get_config("live/1")
        better.reward_fns["short"] = wants_a_short_answer
        rs.adapters.update_config("live/1", better)
        second = wait_until(
            lambda: (found := rs.finetuning.jobs.revisions(job)[-1]).effective_step and found, "revision 2 takes effect"
        )
        wait_until(lambda: rs.finetuning.jobs.get(job).step > second.effective_step, "a step with revision 2")
        rs.finetuning.jobs.stop(job)
        wait_until(lambda: rs.finetuning.jobs.get(job).status == "stopped", "the job stops")

        assert rs.adapters.get("live/1").artifact_path, "a stopped job keeps its adapter"
        for c in rs.finetuning.jobs.completions(job, phase="train"):
            assert set(c.scores) == ({"tag", "short"} if c.step >= second.effective_step else {"tag"})
        log = next(rs.finetuning.jobs.reward_logs(job, function="short"))
        assert log.prints.startswith("length ") and log.revision == 2 and log.step >= second.effective_step
