"""The forecast of a run from its own steps: on series made up here, and on real processes that share memory."""

import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from rewardsmith.train.forecast import Forecast, checkpoints_after, peak_bytes, typical

MIB = 2**20


def seconds(generate=1.0, score=0.1, update=0.9, deliver=0.1, report=0.0, **others: float) -> dict[str, float]:
    phases = {"report": report, "generate": generate, "score": score, "update": update, "deliver": deliver, **others}
    return {"total_reward": 0.5, **{f"seconds/{name}": value for name, value in phases.items()}}


def forecast(total_steps=100, save_every=1000, held_out=0, batch=16) -> Forecast:
    return Forecast(total_steps, save_every, held_out, batch)


def run(forecast: Forecast, steps: Iterator[dict[str, float]], first: int = 1, revision: int = 1) -> dict[str, float]:
    """The metrics after the last of the steps."""
    found: dict[str, float] = {}
    for step, metrics in enumerate(steps, first):
        found = forecast.after(step, metrics, revision)
    return found


def spent(steps: list[dict[str, float]]) -> float:
    return sum(value for metrics in steps for name, value in metrics.items() if name.startswith("seconds/"))


def left(found: dict[str, float]) -> float:
    return found["forecast/seconds_left"]


# ---- seconds


def test_the_first_step_warms_up_and_is_never_counted():
    job = forecast(total_steps=10)
    assert set(job.after(1, seconds(generate=30.0, update=20.0), 1)) <= {"memory/peak_bytes"}
    found = job.after(2, seconds(), 1)
    assert found["forecast/seconds_per_step"] == pytest.approx(2.1)
    assert left(found) == pytest.approx(8 * 2.1)
    assert left(run(job, (seconds() for _ in range(8)), first=3)) == 0.0


@pytest.mark.parametrize("slow_reports", [False, True])
def test_after_calibration_it_says_once_what_a_step_takes(slow_reports: bool):
    job = forecast(total_steps=346)
    said = []
    for step in range(1, 10):
        job.after(step, seconds(report=0.1 if slow_reports else 0.001), 1)
        job.peak = int(0.6 * 2**30)
        said.append(job.announcement())
    if slow_reports:
        assert "a step (generate 1.0, score 0.1, update 0.9, deliver 0.1, report 0.1), 13 min left" in said[2]
    else:
        assert said[2] == (
            "about 2.1 s a step (generate 1.0, score 0.1, update 0.9, deliver 0.1), 12 min left, peak memory 0.6 GiB"
        )
    assert [bool(text) for text in said] == [False, False, True] + [False] * 6


def test_waiting_and_evaluating_are_no_part_of_a_step():
    found = run(forecast(), (seconds(wait=3600.0, evaluate=9.0) for _ in range(8)))
    assert found["forecast/seconds_per_step"] == pytest.approx(2.1)


def test_two_slow_steps_do_not_move_it_and_a_lasting_change_does():
    steady = run(forecast(), (seconds() for _ in range(30)))
    job = forecast()
    disturbed = run(job, (seconds(generate=60.0 if step in (20, 25) else 1.0) for step in range(30)))
    assert left(disturbed) == pytest.approx(left(steady))
    slower = run(job, (seconds(generate=2.0) for _ in range(20)), first=31)
    assert slower["forecast/seconds_per_step"] == pytest.approx(3.1)


def test_completions_that_grow_longer_are_followed():
    total = 200
    job = forecast(total_steps=total)
    growing = [seconds(generate=1 + step / 50, update=1 + step / 100) for step in range(total)]
    for step, metrics in enumerate(growing[: total // 2], 1):
        found = job.after(step, metrics, 1)
    truth, so_far = spent(growing[total // 2 :]), spent(growing[: total // 2])
    assert abs(left(found) - truth) < 0.7 * abs(so_far - truth), "better than the mean of the run so far"


def test_steps_of_two_kinds_count_by_how_often_each_comes():
    """With one prompt in a step the update takes nothing where the group gave no signal."""
    chance = random.Random(0)
    updates = [1.0 if chance.random() < 0.4 else 0.0 for _ in range(1000)]
    job = forecast(total_steps=1000)
    errors = []
    for step, update in enumerate(updates, 1):
        found = job.after(step, seconds(generate=0.0, score=0.0, deliver=0.0, update=update), 1)
        if 20 < step < 980:
            errors.append(found["forecast/seconds_per_step"] - 0.4)
    assert abs(sum(errors) / len(errors)) < 0.06, "a median would say 0 or 1"


def test_new_rewards_are_timed_by_themselves():
    job = forecast()
    run(job, (seconds(score=5.0) for _ in range(20)))
    found = job.after(21, seconds(score=0.1), 2)
    assert found["forecast/seconds_per_step"] == pytest.approx(2.1)
    assert job.after(22, seconds(score=5.0), 1)["forecast/seconds_per_step"] == pytest.approx(7.0)


def test_evaluations_and_checkpoints_to_come_are_counted():
    job = forecast(total_steps=60, save_every=20, held_out=8)
    assert job.after(0, {"eval/total_reward": 0.5, "seconds/evaluate": 30.0}, 1) == {}
    found = run(job, (seconds() for _ in range(19)))
    assert left(found) == pytest.approx(41 * 2.1 + 3 * 30.0), "what a checkpoint takes is not known yet"
    job.after(20, seconds(evaluate=7.0), 1)
    found = job.after(21, seconds(report=4.0), 1)  # the clock of this step holds the saving of the one before
    assert found["forecast/seconds_per_step"] == pytest.approx(2.1)
    assert left(found) == pytest.approx(39 * 2.1 + 2 * (7.0 + 4.0)), "the first evaluation warmed up"


def test_one_slow_evaluation_of_three_does_not_count():
    job = forecast(total_steps=100, save_every=10, held_out=8)
    job.after(0, {"seconds/evaluate": 2.0}, 1)
    evaluations = {10: 2.0, 20: 100.0, 30: 2.0}
    steps = (seconds(**({"evaluate": evaluations[step]} if step in evaluations else {})) for step in range(1, 36))
    assert left(run(job, steps)) == pytest.approx(65 * 2.1 + 7 * 2.0)


def test_an_evaluation_that_was_never_seen_takes_its_share_of_drawing_and_scoring():
    job = forecast(total_steps=40, save_every=20, held_out=32, batch=16)
    found = run(job, (seconds() for _ in range(3)), first=25)
    assert left(found) == pytest.approx(13 * 2.1 + 2 * (1.0 + 0.1))


def test_a_checkpoint_at_every_step():
    found = run(forecast(total_steps=10, save_every=1), (seconds(report=0.4) for _ in range(5)))
    assert left(found) == pytest.approx(5 * (2.1 + 0.4))


@pytest.mark.parametrize(
    ("step", "total", "every", "count"),
    [(0, 60, 20, 3), (20, 60, 20, 2), (59, 60, 20, 1), (60, 60, 20, 0), (60, 65, 20, 1), (65, 65, 20, 0), (1, 5, 9, 1)],
)
def test_checkpoints_to_come(step: int, total: int, every: int, count: int):
    assert checkpoints_after(step, total, every) == count
    assert count == sum(1 for later in range(step + 1, total + 1) if later % every == 0 or later == total)


@pytest.mark.parametrize(
    ("values", "mean"), [([3.0], 3), ([1.0, 3.0], 2), ([1.0, 90.0, 2.0], 2), ([0.0, 1.0, 1.0, 9.0], 1)]
)
def test_extremes_are_left_out(values: list[float], mean: float):
    assert typical(values) == mean


def test_a_run_of_one_step_has_no_forecast_and_no_announcement():
    job = forecast(total_steps=1)
    assert "forecast/seconds_left" not in job.after(1, seconds(), 1)
    assert job.announcement() is None


# ---- memory

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is told by /proc")


def hold(shared: torch.Tensor, own: int, ready, done) -> None:
    torch.set_num_threads(1)  # a fork has none of this process's threads, and would wait for them
    assert shared.sum() == shared.numel()
    held = torch.ones(own // 4)
    ready.set()
    done.wait(60)
    assert held[0] == 1


def told_by_a_fork(function: Callable[[], list[float]]) -> list[float]:
    """A forked process has a high-water mark of its own, whatever other tests held before."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def tell() -> None:
        torch.set_num_threads(1)  # a fork has none of this process's threads, and would wait for them
        theirs.send(function())

    process = context.Process(target=tell)
    process.start()
    told = ours.recv() if ours.poll(60) else []
    process.join()
    return told


@on_linux
def test_memory_that_was_given_back_is_part_of_the_peak():
    def peaks() -> list[float]:
        before = peak_bytes()
        held = torch.ones(150 * MIB // 4)
        assert held[0] == 1
        del held
        return [before, peak_bytes()]

    before, after = told_by_a_fork(peaks)
    assert 120 * MIB < after - before < 180 * MIB


@on_linux
def test_a_job_reports_its_peak_which_rises_and_never_falls():
    def peaks() -> list[float]:
        job = forecast()
        found = [job.after(1, seconds(), 1)["memory/peak_bytes"]]
        held = torch.ones(150 * MIB // 4)
        assert held[0] == 1
        found.append(job.after(2, seconds(), 1)["memory/peak_bytes"])
        del held
        return [*found, job.after(3, seconds(), 1)["memory/peak_bytes"]]

    before, during, after = told_by_a_fork(peaks)
    assert 120 * MIB < during - before < 180 * MIB
    assert after == pytest.approx(during, rel=0.02)


@on_linux
def test_workers_are_counted_and_what_they_share_only_once():
    context = multiprocessing.get_context("fork")
    shared = torch.ones(200 * MIB // 4)
    shared.share_memory_()
    before = peak_bytes()
    ready, done = [context.Event() for _ in range(2)], context.Event()
    workers = [context.Process(target=hold, args=(shared, 60 * MIB, event, done)) for event in ready]
    for worker in workers:
        worker.start()
    try:
        assert all(event.wait(60) for event in ready)
        grown = peak_bytes() - before
        assert 2 * 60 * MIB * 0.9 < grown < 2 * 60 * MIB + 100 * MIB, "counted thrice it would be 400 MiB more"
    finally:
        done.set()
        for worker in workers:
            worker.join()
