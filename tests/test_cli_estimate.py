"""`rewardsmith estimate`: as a process, and how its page looks."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import Qwen2Config

from rewardsmith.cli.estimate import show
from rewardsmith.train.estimate.calibration import Load
from rewardsmith.train.estimate.estimate import Estimate
from rewardsmith.train.estimate.footprint import Memory, Shape

GIB = 2**30
SHAPE = Shape(
    family="qwen2",
    layers=24,
    hidden=896,
    intermediate=4864,
    heads=14,
    kv_heads=2,
    head_dim=64,
    vocab=151_936,
    context=32_768,
    weights=494_000_000,
    linear=358_000_000,
    adapted=358_000_000,
    adapter=8_800_000,
)
PARTS = {"model": int(1.8 * GIB), "merged copy": int(1.3 * GIB), "adapter, optimizer": GIB // 3, "processes": GIB // 3}
FOUND = Estimate(
    model="/models/qwen",
    shape=SHAPE,
    load=Load(prompts=2, group=8, prompt_tokens=256, completion_tokens=300, longest=1024),
    device="cpu",
    ranks=1,
    threads=2,
    path="fast, 1 rank(s) of 2 thread(s), kernels native",
    notices=[],
    memory=Memory(PARTS, generation=GIB, update=2 * GIB, available=20 * GIB, micro_batch_tokens=2048),
    seconds={"generate": 60.0, "update": 30.04, "deliver": 0.05},
    unmeasured="",
    total_steps=200,
    advice=[],
)


def page(found: Estimate, width: int = 80) -> list[str]:
    out = io.StringIO()
    show("qwen", found, Console(file=out, width=width, color_system=None, highlight=False))
    assert max(map(len, out.getvalue().splitlines())) <= 120
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_page_says_what_fits_how_long_it_takes_and_what_it_rests_on():
    assert page(FOUND) == [
        "qwen  qwen2, 24 layers, 494.0 million parameters",
        "",
        "It fits: 6.0 GiB at the peak, 20 GiB are free.",
        "  model                  1.8 GiB  ━━━━━━━━━━━━━━━━━━━━━━",
        "  merged copy            1.3 GiB  ━━━━━━━━━━━━━━━━",
        "  adapter, optimizer     341 MiB  ━━━━",
        "  processes              341 MiB  ━━━━",
        "  generation or update   2.0 GiB  ━━━━━━━━━━━━━━━━━━━━━━━━",
        "",
        "A step takes about 90.1 s, 200 steps about 5 h 0 min.",
        "  generate                60.0 s  ━━━━━━━━━━━━━━━━━━━━━━━━",
        "  update                  30.0 s  ━━━━━━━━━━━━",
        "  deliver                 0.05 s",
        "                        reward functions, evaluations, checkpoints come on top",
        "",
        "This rests on",
        "  a step                2 x 8 completions of 256 + 300 tokens, at most 1024",
        "  machine               cpu, 2 thread(s) for each of 1 rank(s)",
        "  path                  fast, 1 rank(s) of 2 thread(s), kernels native",
        "  adapter               merged into a copy of the weights",
        "  micro-batch           up to 2048 tokens in each rank",
    ]


def test_a_file_gets_the_same_page():
    assert page(FOUND, width=100_000) == page(FOUND)


def test_what_does_not_fit_says_what_would():
    memory = Memory({**PARTS, "merged copy": 0}, generation=GIB, update=GIB, available=GIB, micro_batch_tokens=64)
    found = replace(
        FOUND, memory=memory, seconds=None, unmeasured="it does not fit", path="", advice=["rank=8", "\x1b[2Jrank=4"]
    )
    lines = page(found)
    assert lines[2] == "It does not fit: 3.6 GiB at the peak, 1.0 GiB are free."
    assert "How long a step takes was not measured: it does not fit." in lines
    assert lines[-3:] == ["What would make it fit", "  rank=8", "  \N{REPLACEMENT CHARACTER}[2Jrank=4"]
    assert not [line for line in lines if line.startswith("  merged copy")]


def test_an_adapter_beside_the_weights_and_a_plain_path_are_told():
    parts = {**PARTS, "merged copy": 0}
    found = replace(FOUND, memory=replace(FOUND.memory, parts=parts), path="plain", notices=["it is slower"])
    lines = page(found)
    assert "  path                  plain" in lines
    assert lines[-1] == "  note                  it is slower"


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "rewardsmith", "estimate", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    Qwen2Config(**sizes, num_hidden_layers=2, num_key_value_heads=1).save_pretrained(tmp_path / "model")
    settings = {"effective_batch_size": 8, "num_generations": 4, "sampling_params": {"max_tokens": 8}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.slow
def test_it_needs_a_config_and_neither_weights_nor_a_server(folder: Path):
    said = command("--base-model", "model", "--config", "config.json", "--prompt-tokens", "12", "--json", folder=folder)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert said.stderr == ""
    assert found["load"] == {
        "prompts": 2,
        "group": 4,
        "prompt_tokens": 12,
        "completion_tokens": 8,
        "longest": 8,
    }
    assert found["memory"]["fits"] and found["memory"]["peak"] > 0
    assert found["seconds_per_step"] == pytest.approx(sum(found["seconds"].values()))
    assert found["total_steps"] == 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--base-model", "qwen2-5-7b"], "the config of base model 'Qwen/Qwen2.5-7B' is not on this machine"),
        (["--base-model", "qwen2-5-70b"], "did you mean"),
        (["--config", "config.json"], "which model?"),
        (["--base-model", "model", "--set", "num_generations=3"], "effective_batch_size"),
    ],
)
def test_what_it_cannot_do_is_one_line(folder: Path, arguments: list[str], told: str):
    said = command(*arguments, folder=folder)
    assert said.returncode == 1
    assert said.stdout == ""
    (line,) = said.stderr.strip().splitlines()
    assert told in line
