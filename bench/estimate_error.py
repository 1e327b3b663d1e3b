"""What `rewardsmith estimate` says of a step against what the step takes: seconds by phase and peak memory.

    python bench/estimate_error.py [--json FILE] [--cases tiny small countdown ...] [--repeats 3] [--clock wall|cpu]

Prediction and measurement take turns, each in a process of its own that does what the command, and what a job does:
the prediction reads the model's config only, the measurement takes real steps on the whole model. `--clock cpu` is for
machines with other work on them: one rank, one thread, seconds of its own CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

STEPS = 3  # measured, after one that warms up
COUNTDOWN = "countdown"
PHASES = ("generate", "update", "deliver")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and conditions here")
    parser.add_argument("--cases", nargs="+", default=["tiny", "small", COUNTDOWN], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3, help="predictions and measurements of each case")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--child", choices=("predict", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        one_thread = options.clock == "cpu"
        work = measure if options.child == "measure" else predict
        print(json.dumps(work(options.cases[0], options.tokens, one_thread)))
        return
    rows = [row for name in options.cases for row in compare(name, options)]
    if options.json:
        from harness import machine, versions

        conditions = {"clock": options.clock, "load_average": os.getloadavg(), "repeats": options.repeats}
        found = {"rows": rows, "conditions": conditions, "versions": versions(), "machine": machine()}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def compare(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a case: `ours` is the prediction, `theirs` the measurement, `ratio` theirs to ours."""
    predicted, measured = [], []
    for _ in range(options.repeats):
        measured.append(child("measure", name, options.clock))
        # Random models end their completions by chance: the prediction is told how long they were.
        predicted.append(child("predict", name, options.clock, round(measured[-1]["tokens"])))
    print(f"\n{name}: {predicted[0]['path']}, {measured[0]['tokens']:.0f} tokens a completion")
    print(f"  {'':<10}  {'predicted':>10}  {'measured':>10}  predicted / measured")
    rows = []
    for metric in (*PHASES, "step", "memory"):
        ours, theirs = ([found[metric] for found in side] for side in (predicted, measured))
        one, other = median(ours), median(theirs)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        unit = "MiB" if metric == "memory" else "s"
        print(
            f"  {metric:<10}  {one:>10.3g}  {other:>10.3g}  {one / other:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        rows.append(
            {"case": name, "metric": f"{metric}, {unit}", "ours": one, "theirs": other, "ratio": other / one}
            | {"spread": ratios}
        )
    return rows


def child(what: str, name: str, clock: str, tokens: int | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, "--cases", name, "--clock", clock]
    command += [] if tokens is None else ["--tokens", str(tokens)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if clock == "cpu" else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def predict(name: str, tokens: int, one_thread: bool) -> dict[str, Any]:
    from rewardsmith.train.estimate.estimate import estimate
    from rewardsmith.train.parallel.ranks import Ranks

    config, prompts = _setting(name)
    with tempfile.TemporaryDirectory() as folder:
        if name == COUNTDOWN:
            from rewardsmith.catalog import EMBEDDED

            folder = str(EMBEDDED)
        else:
            from cases import CASES, make_model

            make_model(replace(CASES[name], layers=1)).config.save_pretrained(folder)
            text = json.loads(Path(folder, "config.json").read_text())
            layers = CASES[name].layers
            text |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
            Path(folder, "config.json").write_text(json.dumps(text))
        given: dict[str, Any] = {"start": Ranks, "clock": time.process_time} if one_thread else {}
        found = estimate(folder, config, round(fmean(map(len, prompts))), tokens, **given)
    assert found.seconds is not None, found.unmeasured
    return {
        **found.seconds,
        "step": found.per_step,
        "memory": found.memory.peak / 2**20,
        "path": found.path,
    }


def measure(name: str, _: int, one_thread: bool) -> dict[str, Any]:
    from rewardsmith.train.batch import Example
    from rewardsmith.train.forecast import peak_bytes
    from rewardsmith.train.learner import Learner
    from rewardsmith.train.parallel.ranks import Ranks

    clock = time.process_time if one_thread else time.perf_counter
    config, prompts = _setting(name)
    with Ranks() if one_thread else Ranks.of_this_machine() as ranks:
        learner = Learner(*_model(name), config, ranks=ranks)
        learner.deliver(0)
        found: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "tokens")}
        per_step, group = config.prompts_per_step, config.num_generations
        for step in range(1, STEPS + 2):
            chosen = [prompts[(step * per_step + i) % len(prompts)] for i in range(per_step)]
            begun = clock()
            drawn = dict(learner.engine.generate(chosen, group, config.sampling_params, range(per_step * group)))
            sampled = clock()
            lengths = [len(completion.ids) for i in range(per_step) for completion in drawn[i]]
            batch = [
                Example(chosen[i], completion.ids, (-1.0) ** n, 1 / sum(lengths), completion.logps)
                for i in range(per_step)
                for n, completion in enumerate(drawn[i])
            ]
            learner.update(batch, step, STEPS + 1)
            updated = clock()
            learner.deliver(step)
            values = (sampled - begun, updated - sampled, clock() - updated, fmean(lengths))
            for phase, value in zip(found, values, strict=True):
                found[phase].append(value)
        memory = (peak_bytes() or 0) / 2**20
    middle = {phase: median(values[1:]) for phase, values in found.items()}
    return middle | {"step": sum(middle[phase] for phase in PHASES), "memory": memory}


def _setting(name: str) -> tuple[Any, list[list[int]]]:
    """The config of a case and its prompts."""
    if name != COUNTDOWN:
        from cases import CASES, make_prompts

        from rewardsmith.config import GRPOConfig, SamplingParamsConfig

        case = CASES[name]
        config = GRPOConfig(
            base_model=name,
            train_steps=1000,
            rank=case.rank,
            lora_alpha=case.lora_alpha,
            beta=0.0,
            effective_batch_size=case.completions,
            num_generations=case.group,
            sampling_params=SamplingParamsConfig(max_tokens=case.new_tokens),
        )
        return config, make_prompts(case)
    from rewardsmith.catalog import EMBEDDED
    from rewardsmith.demo import countdown, run
    from rewardsmith.train.model import load_base

    _, tokenizer = load_base(str(EMBEDDED))
    return run.config(0), [tokenizer.encode(row["prompt"]) for row in countdown.rows("train", 64)]


def _model(name: str) -> tuple[Any, Any]:
    if name == COUNTDOWN:
        from rewardsmith.catalog import EMBEDDED
        from rewardsmith.train.model import load_base

        return load_base(str(EMBEDDED))
    from cases import CASES, make_model, make_tokenizer

    return make_model(CASES[name]), make_tokenizer(CASES[name])


if __name__ == "__main__":
    main()
