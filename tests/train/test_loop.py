"""Whole job attempts on a tiny random model: real engine, reward pool, files and HTTP; only the server is scripted."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from job_runs import (
    LETTER_A,
    LONG,
    UUID,
    at_step,
    config,
    events,
    finish,
    revision,
    rows,
    run,
    segment_rows,
    series,
    spec,
    write_rows,
)
from peft import PeftModel
from scripted_server import ScriptedServer
from tiny_models import random_model, tokenizer

from rewardsmith.jobs.entry import LEASE_LOST, YIELDED
from rewardsmith.train.lora import CONFIG_FILE, WEIGHTS_FILE
from rewardsmith.wire import Control, ResumePoint


def adapter_bytes(folder: Path, server: ScriptedServer) -> list[bytes]:
    return [(folder / body["path"] / WEIGHTS_FILE).read_bytes() for body in server.bodies("checkpoint")]


NOT_TIMED = {
    *("total_reward", "total_reward_std", "reward/letter_a/mean", "reward/letter_a/std", "reward/letter_a/error_rate"),
    *("group/frac_zero_signal", "group/frac_all_best", "group/frac_all_worst", "entropy", "clip_ratio/low"),
    *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
    *("completions/duplicate_ratio", "clip_ratio/high", "mismatch/kl", "mismatch/logp_max_diff", "grad_norm"),
    *("learning_rate", "loss", "epoch", "tokens"),
}
TIMED = {
    *("memory/peak_bytes", "forecast/seconds_per_step", "forecast/seconds_left"),
    *("seconds/generate", "seconds/score", "seconds/update", "seconds/deliver", "seconds/report", "seconds/wait"),
    *("tokens_per_second", "reward/letter_a/seconds_p95", "seconds/evaluate"),
}


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"scores": [(name, score["value"], score["outcome"]) for name, score in row["scores"]]}


def results(server: ScriptedServer) -> list[dict[str, float]]:
    return [
        {name: value for name, value in body["metrics"].items() if name not in TIMED}
        for body in server.bodies("report")
    ]


def test_a_job_reports_every_step_its_completions_and_an_adapter_that_peft_loads(model: Path, folder: Path):
    with ScriptedServer(spec(folder, model, config(beta=0.01))) as server:
        assert run(server) == 0
    reports = server.bodies("report")
    assert [body["step"] for body in reports] == [0, 1, 2, 3, 4]
    held_out = {"eval/total_reward", "eval/letter_a", "seconds/evaluate"}
    assert set(reports[0]["metrics"]) == held_out | {"epoch"}
    for body in reports[1:]:
        always = NOT_TIMED | TIMED - held_out | {"kl"}
        if body["step"] == 1:  # a cold step forecasts nothing
            always -= {"forecast/seconds_per_step", "forecast/seconds_left"}
        assert set(body["metrics"]) == (always | held_out if body["step"] in (2, 4) else always)
        assert (body["metrics"]["clip_ratio/low"], body["metrics"]["clip_ratio/high"]) == (0, 0)
        assert (body["totalSteps"], body["stepsPerEpoch"], body["revision"]) == (4, 3, 1)
        assert body["epoch"] == pytest.approx(body["step"] / 3)
    assert max(series(server, "mismatch/logp_max_diff").values()) < 1e-4
    assert series(server, "kl")[1] == 0 < series(server, "kl")[4]

    checkpoints = server.bodies("checkpoint")
    assert [(body["checkpoint"], body["step"]) for body in checkpoints] == [(1, 2), (2, 4)]
    best = max(checkpoints, key=lambda body: body["evalReward"])
    assert finish(server) == {"fence": 1, "status": "completed", "error": None, "checkpoint": best["checkpoint"]}
    path = folder / checkpoints[1]["path"]
    assert json.loads((path / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(model)
    PeftModel.from_pretrained(random_model("qwen2"), path)


def test_segments_hold_every_completion_and_every_call(model: Path, folder: Path):
    noisy = "def noisy(prompt, completion, example):\n    print('row', example['n'])\n    return len(completion)\n"
    first = revision(letter_a=LETTER_A, noisy=noisy)
    with ScriptedServer(spec(folder, model, config(), first=first)) as server:
        assert run(server) == 0
    train = segment_rows(folder, server, "completions")
    assert [(row["step"], row["idx"]) for row in train] == [(step, idx) for step in (1, 2, 3, 4) for idx in range(8)]
    written = rows(6, 3)
    for row in train:
        scores = dict(row["scores"])
        assert row["prompt"] == written[row["row"]]["prompt"] and row["row"] < 6
        assert row["total_reward"] == pytest.approx(scores["letter_a"]["value"] + scores["noisy"]["value"])
        assert scores["letter_a"]["value"] == row["completion"].count("a") / 8
        assert (row["phase"], row["revision"], row["policy_version"]) == ("train", 1, row["step"] - 1)
        assert row["tokens"] == len(tokenizer()(row["completion"])["input_ids"]) + (row["finish_reason"] == "stop")
        assert row["sample"] == row["idx"] % 4
    for step in (1, 2, 3, 4):
        of_step = [row for row in train if row["step"] == step]
        assert series(server, "total_reward")[step] == pytest.approx(sum(r["total_reward"] for r in of_step) / 8)
        for start in (0, 4):
            assert abs(sum(row["advantage"] for row in of_step[start : start + 4])) < 1e-6
    held_out = segment_rows(folder, server, "completions", "eval")
    assert [row["step"] for row in held_out] == [0] * 3 + [2] * 3 + [4] * 3
    assert {row["row"] for row in held_out} == {6, 7, 8}
    assert {row["advantage"] for row in held_out} == {None}
    assert [row["policy_version"] for row in held_out] == [row["step"] for row in held_out]
    logs = segment_rows(folder, server, "reward_logs")
    assert len(logs) == 2 * len(train), "a row for every call"
    logs = [row for row in logs if row["function"] == "noisy"]
    assert all(row["prints"].strip() == f"row {written[row['row']]['n']}" for row in logs)


@pytest.mark.parametrize(
    ("changes", "workers"),
    [({}, 0), ({"lora_dropout": 0.3, "beta": 0.05}, 0), ({"updates_per_batch": 2, "beta": 0.05}, 1)],
    ids=["plain", "dropout and kl", "two ranks, two updates and kl"],
)
def test_a_resumed_job_is_the_uninterrupted_one_bit_for_bit(changes: dict, workers: int, model: Path, folder: Path):
    job = config(train_steps=6, lr_scheduler={"type": "cosine"}, **changes)
    elsewhere = folder / "elsewhere"
    write_rows(elsewhere, rows(6, 3))
    with ScriptedServer(spec(elsewhere, model, job)) as whole:
        assert run(whole, workers=workers) == 0
    if workers:
        assert any("fast, 2 rank(s)" in message for message in events(whole, "info"))

    yielding = threading.Event()
    with ScriptedServer(spec(folder, model, job)) as first:
        first.on_report = at_step(3, yielding.set)  # SIGTERM in the third step: finish it, checkpoint, make room
        assert run(first, yielding, workers) == YIELDED
    assert not first.bodies("finish")
    last = first.bodies("checkpoint")[-1]
    assert (last["checkpoint"], last["step"], last["evalReward"]) == (2, 3, None)
    resume = ResumePoint(step=3, checkpoint=2, state_path=last["statePath"])
    with ScriptedServer(spec(folder, model, job, fence=2, resume=resume)) as second:
        assert run(second, workers=workers) == 0

    assert results(first) + results(second) == results(whole)
    assert adapter_bytes(folder, second)[-1] == adapter_bytes(elsewhere, whole)[-1]
    assert finish(second)["checkpoint"] == finish(whole)["checkpoint"]
    completions = segment_rows(folder, first, "completions") + segment_rows(folder, second, "completions")
    assert [untimed(row) for row in completions] == [
        untimed(row) for row in segment_rows(elsewhere, whole, "completions")
    ]


def test_a_reward_that_can_be_learned_rises(model: Path, tmp_path: Path):
    write_rows(tmp_path, rows(8))
    job = config(train_steps=15, save_every=15, effective_batch_size=64, num_generations=16, learning_rate=2e-2)
    with ScriptedServer(spec(tmp_path, model, job)) as server:
        assert run(server) == 0
    rewards = list(series(server, "total_reward").values())
    assert sum(rewards[:3]) / 3 < 0.15
    assert sum(rewards[-3:]) / 3 > 0.6
    assert max(series(server, "mismatch/logp_max_diff").values()) < 1e-3


def test_what_a_config_cannot_do_is_said_once_in_plain_words(model: Path, tmp_path: Path):
    write_rows(tmp_path, [*rows(6), {"prompt": "a" * 70, "n": 0}])
    job = config(
        train_steps=1,
        enable_early_stopping=True,
        clip_high=0.28,
        sampling_params={"max_tokens": 60, "top_k": 5},
        effective_batch_size=4,
        eval_fraction=0.2,
        warmup_ratio=0.1,
        lr_scheduler={"type": "constant", "num_cycles": 2},
    )
    with ScriptedServer(spec(tmp_path, model, job)) as server:
        assert run(server) == 0
    said = events(server, "warning")
    for part in (
        "1 row(s) left out",
        "max_tokens=60 is cut to what the model's context of 64 tokens leaves after each prompt: 50",
        "early stopping cannot act",
        "paged_adamw_8bit: AdamW runs with 32-bit states",
        "clip_low and clip_high cannot act",
        "1 steps are fewer than the recommended 200",
        "eval_fraction cannot act",
        "num_cycles=2 cannot act",
        "warmup_ratio=0.1 cannot act",
    ):
        assert sum(part in message for message in said) == 1, (part, said)
    assert len(said) == 9
    with ScriptedServer(spec(tmp_path, model, job, fence=2)) as again:
        assert run(again) == 0
    assert not events(again, "warning")


def test_prompts_on_both_sides_of_a_split_are_counted(model: Path, tmp_path: Path):
    twice = [{"prompt": "say", "split": "evaluation"}, {"prompt": "say", "split": "evaluation"}]
    write_rows(tmp_path, [*rows(6, 3), *twice])
    with ScriptedServer(spec(tmp_path, model, config(train_steps=1))) as server:
        assert run(server) == 0
    assert [message for message in events(server, "warning") if message.startswith("1 prompt(s) are both")]


def test_an_ordinary_config_is_not_commented(model: Path, folder: Path):
    job = config(train_steps=200, enable_early_stopping=True, optimizer={"type": "adamw_torch"})
    with ScriptedServer(spec(folder, model, job)) as server:
        server.on_report = at_step(1, lambda: setattr(server, "control", Control(action="cancel")))
        assert run(server) == 0
    assert not events(server, "warning")


def test_stop_ends_at_the_step_boundary_with_an_adapter(model: Path, tmp_path: Path):
    write_rows(tmp_path, rows(6))
    with ScriptedServer(spec(tmp_path, model, config(train_steps=LONG))) as server:
        server.on_report = at_step(3, lambda: setattr(server, "control", Control(action="stop")))
        assert run(server) == 0
    assert [body["step"] for body in server.bodies("report")] == [1, 2, 3]
    assert [(body["checkpoint"], body["step"]) for body in server.bodies("checkpoint")] == [(1, 2), (2, 3)]
    assert finish(server) == {"fence": 1, "status": "stopped", "error": None, "checkpoint": 2}


def test_cancel_ends_at_once_and_leaves_what_was_saved(model: Path, tmp_path: Path):
    write_rows(tmp_path, rows(6))
    with ScriptedServer(spec(tmp_path, model, config(train_steps=LONG))) as server:
        server.on_report = at_step(3, lambda: setattr(server, "control", Control(action="cancel")))
        assert run(server) == 0
    assert finish(server) == {"fence": 1, "status": "canceled", "error": None, "checkpoint": 1}


def test_a_lost_lease_ends_the_process_without_another_word(model: Path, folder: Path):
    with ScriptedServer(spec(folder, model, config(train_steps=LONG))) as server:
        server.on_report = at_step(2, lambda: server.faults.extend([409] * 50))
        assert run(server) == LEASE_LOST
    assert not server.bodies("finish")


def test_reports_survive_a_server_that_fails_and_drops(model: Path, folder: Path):
    with ScriptedServer(spec(folder, model, config())) as calm:
        assert run(calm) == 0
    with ScriptedServer(spec(folder, model, config(), fence=2)) as rough:
        rough.on_report = at_step(1, lambda: rough.faults.extend(["drop", 503, "refuse", 500]))
        assert run(rough) == 0
    kept = {body["step"]: body for body in rough.bodies("report")}
    assert sorted(kept) == [0, 1, 2, 3, 4]
    assert results(calm) == [
        {name: value for name, value in body["metrics"].items() if name not in TIMED} for body in kept.values()
    ]


def test_a_checkpoint_that_cannot_be_written_is_the_jobs_error_and_is_not_served(model: Path, folder: Path):
    with ScriptedServer(spec(folder, model, config())) as server:

        def on_report(path: str, body: dict[str, Any]) -> None:
            if path == "report" and body["step"] == 2:
                (folder / "jobs" / UUID / "checkpoints").write_text("a file where a folder has to be")

        server.on_report = on_report
        assert run(server) == 0
    assert not server.bodies("checkpoint")
    assert (finish(server)["status"], finish(server)["checkpoint"]) == ("errored", None)
    assert "cannot be written" in finish(server)["error"]


def test_a_cancel_in_answer_to_an_evaluated_step_names_no_checkpoint_that_was_not_reported(model: Path, folder: Path):
    with ScriptedServer(spec(folder, model, config())) as server:
        server.on_report = at_step(2, lambda: setattr(server, "control", Control(action="cancel")))
        assert run(server) == 0
    assert not server.bodies("checkpoint")
    assert finish(server) == {"fence": 1, "status": "canceled", "error": None, "checkpoint": None}


def test_held_out_rows_choose_the_best_checkpoint_and_stop_a_run_that_has_stalled(model: Path, folder: Path):
    constant = revision(constant="def constant(prompt, completion, example):\n    return 0.5\n")
    job = config(train_steps=LONG, save_every=1, enable_early_stopping=True)
    with ScriptedServer(spec(folder, model, job, first=constant)) as server:
        assert run(server) == 0
    assert series(server, "eval/total_reward") == dict.fromkeys(range(6), 0.5)
    assert series(server, "group/frac_zero_signal") == dict.fromkeys(range(1, 6), 1.0)
    assert finish(server) == {"fence": 1, "status": "completed", "error": None, "checkpoint": 1}
    *_, message = events(server, "info")
    assert "stopped early" in message
    assert [body["best"] for body in server.bodies("checkpoint")] == [True, False, False, False, False]
    # Nothing was learned from, so nothing has moved.
    assert len(set(adapter_bytes(folder, server))) == 1


def test_an_unexpected_error_is_reported_with_its_type(model: Path, folder: Path):
    (folder / "datasets" / "rows.jsonl").write_text('{"prompt": "ab"}\n{"no prompt": 1}\n')
    with ScriptedServer(spec(folder, model, config())) as server:
        assert run(server) == 0
    assert finish(server)["status"] == "errored"
    assert finish(server)["error"].startswith("KeyError: 'prompt'") and "log" in finish(server)["error"]


def test_a_model_that_cannot_be_loaded_is_the_jobs_error(folder: Path):
    with ScriptedServer(spec(folder, folder / "no-model", config())) as server:
        assert run(server) == 0
    assert finish(server)["status"] == "errored" and "cannot be loaded" in finish(server)["error"]


def test_a_run_continues_from_a_checkpoint_of_another(model: Path, tmp_path: Path):
    write_rows(tmp_path, rows(6))
    with ScriptedServer(spec(tmp_path, model, config())) as first:
        assert run(first) == 0
    path = first.bodies("checkpoint")[-1]["path"]
    job = config(train_steps=1, learning_rate=1e-12, seed=4)
    with ScriptedServer(spec(tmp_path, model, job, fence=5, continue_from_path=path)) as second:
        assert run(second) == 0
    from safetensors.torch import load

    (before,) = [load(adapter_bytes(tmp_path, first)[-1])]
    (after,) = [load(content) for content in adapter_bytes(tmp_path, second)]
    assert before.keys() == after.keys()
    assert all((after[name] - before[name]).abs().max() < 1e-9 for name in before)


def test_rows_that_come_twice_in_a_step_give_different_completions(model: Path, tmp_path: Path):
    write_rows(tmp_path, rows(1))
    job = config(train_steps=1, effective_batch_size=16, sampling_params={"max_tokens": 12})
    with ScriptedServer(spec(tmp_path, model, job)) as server:
        assert run(server) == 0
    train = segment_rows(tmp_path, server, "completions")
    assert sorted(row["sample"] for row in train) == list(range(16))
    assert len({row["completion"] for row in train}) > 8
