"""Train with another model as the judge, over any endpoint that speaks OpenAI's chat completions.

    JUDGE_API_KEY=sk-... python examples/llm_judge.py https://api.example.com/v1 judge-model [steps]

Needs a running server: `rewardsmith serve`. A judge on the server's own machine or in its private network has to be
allowed there: `rewardsmith serve --private-endpoint localhost:8000`. Functions reach that one endpoint and no other;
the key is stored encrypted, and no log, event or traceback shows it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from rewardsmith import (
    GRPOConfig,
    RequestError,
    RewardFunction,
    RewardFunctionsConfig,
    RewardFunctionsRuntimeConfig,
    Rewardsmith,
    SamplingParamsConfig,
)
from rewardsmith.demo import countdown
from rewardsmith.rewards.library import llm_judge

url, model = sys.argv[1:3]
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 40
address = urlsplit(url)
endpoint = f"{address.hostname}:{address.port or (443 if address.scheme == 'https' else 80)}"

rs = Rewardsmith()
key = os.environ.get("JUDGE_API_KEY", "no key needed")
try:
    rs.secrets.create("JUDGE_API_KEY", key)
except RequestError:
    rs.secrets.update("JUDGE_API_KEY", key)

name = "llm-judge-example"
if name not in {dataset.name for dataset in rs.datasets.list()}:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in countdown.rows("train", 100)))
        rs.datasets.from_file(path, name=name)

adapter = rs.adapters.create(
    repo=rs.repos.create(name=name, exists_ok=True),
    dataset=name,
    config=GRPOConfig(
        base_model="countdown-tiny",
        reward_fns=RewardFunctionsConfig(
            functions={
                "format": countdown.format_reward,
                # A judge that is away is no zero: its completion is left out.
                "judge": RewardFunction.from_callable(llm_judge, on_error="exclude"),
            },
            runtime=RewardFunctionsRuntimeConfig(network=[endpoint], call_seconds=120, concurrency=8),
        ),
        secrets={"JUDGE_API_KEY": "secret:JUDGE_API_KEY", "JUDGE_URL": url, "JUDGE_MODEL": model},
        train_steps=steps,
        learning_rate=1e-3,
        rank=16,
        lora_alpha=32,
        beta=0.0,
        effective_batch_size=32,
        num_generations=8,
        sampling_params=SamplingParamsConfig(max_tokens=96),
    ),
)
print(f"trained {adapter.name}")
