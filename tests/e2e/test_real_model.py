"""A real pretrained model through the whole product: BabyLlama learns to tell stories about dogs."""

import json
from pathlib import Path

import pytest
from processes import Server, wait_until

from rewardsmith import GRPOConfig, SamplingParamsConfig

MODEL = Path(__file__).parents[3] / "shared" / "data" / "models" / "babyllama361"
STEPS = 30
BEGINNINGS = [
    "Once upon a time, there was a little girl",
    "One day, a boy named Tim went to",
    "There was a small house near the river",
    "Lily and her mom walked in the park",
    "In the garden, Ben found a big",
    "It was a sunny day and Sue wanted to play",
    "A happy family lived in a village",
    "Tom was sad because he lost his",
    "Mia opened the door and saw",
    "On his birthday, Sam got a new",
    "The children ran to the hill and",
    "Every morning, Anna looked out of the window",
]


def mentions_a_dog(prompt, completion, example):
    return 1.0 if "dog" in completion else 0.0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not MODEL.exists(), reason=f"the pretrained model is not at {MODEL}")
def test_a_pretrained_model_learns_what_the_reward_wants(tmp_path: Path):
    rows = tmp_path / "stories.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in BEGINNINGS))
    with Server(tmp_path / "home") as server:
        rs = server.client()
        rs.datasets.from_file(rows, name="stories")
        rs.repos.create(name="dogs")
        job = rs.finetuning.jobs.create(
            config=GRPOConfig(
                base_model=str(MODEL),
                reward_fns={"dog": mentions_a_dog},
                train_steps=STEPS,
                learning_rate=1e-3,
                lr_scheduler={"type": "constant_with_warmup"},
                rank=16,
                lora_alpha=32,
                beta=0.02,
                effective_batch_size=64,
                num_generations=16,
                sampling_params=SamplingParamsConfig(max_tokens=100),
                seed=1,
            ),
            dataset="stories",
            repo="dogs",
        )
        wait_until(lambda: rs.finetuning.jobs.get(job).status in ("completed", "errored"), "the job ends", seconds=800)
        assert rs.finetuning.jobs.get(job).error is None
        rewards = [point.value for point in rs.finetuning.jobs.metrics(job)["total_reward"]]
        assert len(rewards) == STEPS
        assert sum(rewards[:2]) / 2 < 0.2, rewards
        assert sum(rewards[-5:]) / 5 > 0.8, rewards
