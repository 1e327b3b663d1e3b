"""`rewardsmith demo`: the main job, start to end, on the embedded model, through the public SDK.

It uses the server that answers here or starts one, trains `countdown-tiny` on Countdown, and shows what changed: the
reward curves, the held-out score before and after, and answers of the base model and the adapter side by side. These
answers are those the job stored when it scored the held-out rows before the first and after the last step.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewardsmith.client import Rewardsmith
from rewardsmith.client.objects import Adapter, FinetuningJob
from rewardsmith.config import (
    GRPOConfig,
    OptimizerConfig,
    SamplingParamsConfig,
    SchedulerConfig,
)
from rewardsmith.demo import countdown
from rewardsmith.demo.plot import curve
from rewardsmith.errors import RewardsmithError
from rewardsmith.home import DEFAULT_PORT, default_base_url, default_home
from rewardsmith.reward_config import RewardFunctionsConfig

REPO = "countdown-demo"
TRAIN_ROWS, HELD_OUT_ROWS = 300, 256
SERVER_START_SECONDS = 60

console = Console(highlight=False)


def config(seed: int) -> GRPOConfig:
    return GRPOConfig(
        base_model="countdown-tiny",
        reward_fns=RewardFunctionsConfig(
            functions={"format": countdown.format_reward, "equation": countdown.equation_reward}
        ),
        train_steps=40,
        learning_rate=1e-3,
        lr_scheduler=SchedulerConfig(type="constant_with_warmup"),
        warmup_ratio=0.125,
        optimizer=OptimizerConfig(type="adamw_torch", beta2=0.95),
        rank=16,
        lora_alpha=32,
        beta=0.0,
        effective_batch_size=256,
        num_generations=16,
        sampling_params=SamplingParamsConfig(temperature=1.0, max_tokens=96),
        enable_early_stopping=False,
        save_every=20,
        seed=seed,
    )


def run(*, seed: int = 0, exit_when_done: bool = False, json_file: Path | None = None) -> None:
    """Train, show, and serve until Ctrl-C (or end, with `exit_when_done`). Raises what the SDK raises."""
    started = time.monotonic()
    with _server() as url:
        rs = Rewardsmith(base_url=url)
        adapter = _train(rs, seed)
        job = rs.finetuning.jobs.get(adapter.name)
        figures = _figures(rs, job, adapter) | {
            "seed": seed,
            "server": url,
            "seconds_in_all": round(time.monotonic() - started, 1),
        }
        _show(rs, job, figures)
        if json_file is not None:
            json_file.write_text(json.dumps(figures, indent=2) + "\n")
        if not exit_when_done:
            _serve_until_interrupted(url)


@contextmanager
def _server() -> Iterator[str]:
    """The URL of the server that answers here, else of one that lives as long as the demo."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))  # so that the server started below is ended too
    url = default_base_url()
    if _answers(url):
        console.print(f"Using the server that runs at {url}")
        yield url
        return
    port = DEFAULT_PORT if _is_free(DEFAULT_PORT) else _free_port()
    url = f"http://127.0.0.1:{port}"
    console.print(f"Starting a server on {url}, home {default_home()}")
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "rewardsmith", "serve", "--port", str(port)]
        if sys.platform != "linux":
            # Nothing keeps reward functions in there, and the demo's own are known. The console says it.
            command.append("--unsafe-rewards")
            console.print("[bold red]UNSAFE: on this system reward functions run without a sandbox.[/]")
        # A session of its own: Ctrl-C in the terminal reaches the demo, which then ends the server in order.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = time.monotonic() + SERVER_START_SECONDS
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    said = output.read().decode(errors="replace").strip()
                    raise RewardsmithError(f"the server did not start. It said:\n{said}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    """Whether a server answers at `url` and knows this user's token."""
    try:
        Rewardsmith(base_url=url, quiet=True)
    except RewardsmithError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _train(rs: Rewardsmith, seed: int) -> Adapter:
    rows = countdown.rows("train", TRAIN_ROWS, seed) + countdown.rows("held_out", HELD_OUT_ROWS, seed)
    repo = rs.repos.create(name=REPO, description="Countdown on the embedded model", exists_ok=True)
    name = f"{REPO}-seed-{seed}"
    known = {dataset.name: dataset for dataset in rs.datasets.list()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = known.get(name) or rs.datasets.from_file(path, name=name)
    return rs.adapters.create(config=config(seed), dataset=dataset, repo=repo, description=f"demo, seed {seed}")


def _figures(rs: Rewardsmith, job: FinetuningJob, adapter: Adapter) -> dict[str, Any]:
    series = rs.finetuning.jobs.metrics(job)
    evaluations = [
        {"step": point.step, "total": point.value}
        | {name: _at(series[f"eval/{name}"], point.step) for name in job.params.reward_fns}
        for point in series["eval/total_reward"]
    ]
    # The checkpoint that is served is the best by held-out rows, not always the last.
    served = next(checkpoint for checkpoint in adapter.checkpoints if checkpoint.path == adapter.artifact_path)
    training = next(e.at for e in rs.finetuning.jobs.events(job) if e.message.startswith("training"))
    return {
        "adapter": adapter.name,
        "adapter_path": str(default_home() / "artifacts" / str(adapter.artifact_path)),
        "steps": job.step,
        "training_seconds": round((job.updated_at - training).total_seconds(), 1) if job.updated_at else None,
        "held_out_rows": HELD_OUT_ROWS,
        "before": evaluations[0],
        "after": next(evaluation for evaluation in evaluations if evaluation["step"] == served.step),
        "evaluations": evaluations,
        "curves": {name: [p.value for p in series[f"reward/{name}/mean"]] for name in job.params.reward_fns},
    }


def _at(points: list[Any], step: int) -> float:
    return float(next(point.value for point in points if point.step == step))


def _show(rs: Rewardsmith, job: FinetuningJob, figures: dict[str, Any]) -> None:
    for name, values in figures["curves"].items():
        console.print(f"\n{curve(f'{name}: mean of each step', values)}")

    console.print(f"\n  {figures['held_out_rows']} held-out problems, none of them trained on")
    table = Table()
    table.add_column("after step", justify="right")
    for name in figures["curves"]:
        table.add_column(name, justify="right")
    for evaluation in figures["evaluations"]:
        label = f"{evaluation['step']}" if evaluation["step"] else "0 (base model)"
        table.add_row(label, *(f"{evaluation[name]:.1%}" for name in figures["curves"]))
    console.print(table)

    console.print("\n  Three held-out problems that only the adapter solved, with the answers as they were sampled")
    for before, after in _pairs(rs, job, figures["after"]["step"]):
        console.print(f"\n  {_problem(before.prompt)}")
        table = Table(expand=True)
        for side, completion in (("base model", before), ("adapter", after)):
            table.add_column(f"{side}: {_marks(completion.scores)}", ratio=1)
        table.add_row(Text(before.completion), Text(after.completion))
        console.print(table)

    gain = figures["after"]["equation"] - figures["before"]["equation"]
    console.print(
        f"\n[bold]Held-out equations solved: {figures['before']['equation']:.1%} -> "
        f"{figures['after']['equation']:.1%}[/bold] ({100 * gain:+.1f} points) "
        f"after {figures['after']['step']} steps; {figures['training_seconds']:.0f} s of training"
    )
    console.print(f"The adapter {figures['adapter']} lies in {figures['adapter_path']}", soft_wrap=True)
    console.print(f"A copy to keep: rewardsmith adapters download {figures['adapter']}", soft_wrap=True)


def _pairs(rs: Rewardsmith, job: FinetuningJob, step: int) -> list[tuple[Any, Any]]:
    """Three held-out rows with the base's and the adapter's answer, first those that only the adapter solved."""

    def answers(step: int) -> dict[int, Any]:
        return {c.row: c for c in rs.finetuning.jobs.completions(job, phase="eval", step=step)}

    base, adapter = answers(0), answers(step)
    rows = sorted(base, key=lambda row: (base[row].total_reward - adapter[row].total_reward, row))
    return [(base[row], adapter[row]) for row in rows[:3]]


def _problem(prompt: str) -> str:
    start = prompt.index("Using the numbers")
    return prompt[start : prompt.index(".", start)]


def _marks(scores: dict[str, float | None]) -> str:
    return "  ".join(f"{name} {value:g}" if value is not None else f"{name} --" for name, value in scores.items())


def _serve_until_interrupted(url: str) -> None:
    console.print(f"\nThe server goes on at [bold]{url}[/bold]. Ctrl-C ends it.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("\nStopping the server.")
