"""Teach the embedded model to solve more Countdown problems. Needs a running server: `rewardsmith serve`.

python examples/countdown.py [steps]
"""

import json
import sys
import tempfile
from pathlib import Path

from rewardsmith import GRPOConfig, Rewardsmith, SamplingParamsConfig
from rewardsmith.demo import countdown

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
rs = Rewardsmith()

rows = countdown.rows("train", 300) + countdown.rows("held_out", 128)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A second run finds its dataset there already.
    known = {dataset.name for dataset in rs.datasets.list()}
    dataset = (
        "countdown-example" if "countdown-example" in known else rs.datasets.from_file(path, name="countdown-example")
    )

repo = rs.repos.create(name="countdown-example", exists_ok=True)
adapter = rs.adapters.create(
    repo=repo,
    dataset=dataset,
    config=GRPOConfig(
        base_model="countdown-tiny",
        reward_fns={"format": countdown.format_reward, "equation": countdown.equation_reward},
        train_steps=steps,
        learning_rate=1e-3,
        rank=16,
        lora_alpha=32,
        beta=0.0,
        effective_batch_size=256,
        num_generations=16,
        sampling_params=SamplingParamsConfig(max_tokens=96),
    ),
)
rs.adapters.download(adapter.name, dest="countdown-adapter.zip")
