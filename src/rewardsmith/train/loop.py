"""The training loop. Read this first.

GRPO: no value model, no replay; the reference is the model with its adapter off, the old policy the one that sampled.
A step is a function of the weights and the step's number, which is why a killed job goes on to the same numbers.
Set up in `setup`; the mathematics is in `grpo`, what leaves the process goes through `journal`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rewardsmith.errors import RewardPoolError, SandboxError
from rewardsmith.rewards.outcomes import ErrorGuard
from rewardsmith.train import checkpoint
from rewardsmith.train.agreement import Mismatch
from rewardsmith.train.batch import Example
from rewardsmith.train.clock import Clock
from rewardsmith.train.evaluate import BETTER_BY, PATIENCE, evaluate, exhausted, note_evaluation
from rewardsmith.train.metrics import step_metrics
from rewardsmith.train.samples import Sample, examples, roll_out, with_advantages
from rewardsmith.train.segments import Moment, write_segments
from rewardsmith.train.setup import Run
from rewardsmith.train.update import Update
from rewardsmith.wire import CheckpointReport, Segment, StepReport

log = logging.getLogger("rewardsmith.train")

Ending = Literal["completed", "stopped", "yielded"]

SILENT_STEPS = 10  # without any signal in any group, after which the job says so


def train(run: Run) -> Ending:
    """From where the run stands to its end. Raises JobCanceled, LeaseLost, ServerLost and what else ends a job."""
    run.journal.beat()  # what happened before this attempt: a pause, a new revision
    if run.progress.step == 0 and run.held_out:
        report_base(run)
    clock = Clock()
    ending = obey(run, patiently=True)
    while ending is None:
        step = run.progress.step + 1
        prompts = run.batches.take(step)
        weights, check = run.weights(step), run.journal.check
        groups = roll_out(run.learner.engine, run.pool, prompts, run.config, clock, step, weights, check)
        begin_comparing(run, step, groups)
        with clock("update"):
            groups, batch = to_learn(run, groups)
            result, mismatch = run.learner.update(batch, step, run.total_steps)
        with clock("deliver"):
            run.learner.deliver(version=step)
        run.progress.step = step
        due = step % run.config.save_every == 0 or step == run.total_steps
        evaluation = evaluate_policy(run) if due and run.held_out else Evaluation()
        report = step_report(run, groups, result, mismatch, evaluation, clock)
        clock = Clock()  # sending is timed with the step to come: its own report is written by then
        with clock("report"):
            run.journal.send(report)
            if said := run.forecast.announcement():
                run.journal.event("info", said, step=step)
            for note in run.pool.take_notes():
                run.journal.event("info", note, step=step)
            if due:
                save(run, evaluation.reward)
            pause_on_errors(run, groups)
            warn_without_signal(run, groups)
        ending = obey(run)
    return ending


def to_learn(run: Run, groups: Sequence[Sequence[Sample]]) -> tuple[list[list[Sample]], list[Example]]:
    """The groups with their advantages, and the batch that the update learns from."""
    reference_logps = None
    if run.config.kl_in == "reward":
        reference_logps = run.learner.reference_logps(examples(groups, run.config, run.max_tokens))
    judged = with_advantages(groups, run.config, run.max_tokens, reference_logps)
    return judged, examples(judged, run.config, run.max_tokens)


@dataclass(frozen=True)
class Evaluation:
    """The held-out rows under one policy; empty when they were not drawn."""

    metrics: dict[str, float] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)

    @property
    def reward(self) -> float | None:
        return self.metrics.get("eval/total_reward")


def evaluate_policy(run: Run) -> Evaluation:
    """The held-out rows under the present policy; their files are written, nothing is sent."""
    started, step = time.perf_counter(), run.progress.step
    # By the weights that the run ends with: with those of the step, no two evaluations could be compared.
    weights = run.weights(run.total_steps)
    samples = evaluate(run.learner.engine, run.pool, run.held_out, run.config, weights, run.journal.check)
    moment = Moment(step, run.batches.epoch(step), "eval", run.revision, policy_version=step)
    segments, _ = write_segments(run.artifacts, moment, samples)
    metrics = note_evaluation(run.progress, samples)
    return Evaluation(metrics | {"seconds/evaluate": time.perf_counter() - started}, segments)


def report_base(run: Run) -> None:
    """Step 0: the held-out rows under the policy that training starts from."""
    base = evaluate_policy(run)
    run.journal.send(as_report(run, base.metrics, base.segments))


def step_report(
    run: Run,
    groups: Sequence[Sequence[Sample]],
    result: Update,
    mismatch: Mismatch,
    evaluation: Evaluation,
    clock: Clock,
) -> StepReport:
    """The step that was just taken, its completions written to files."""
    step = run.progress.step
    samples = [sample for group in groups for sample in group]
    moment = Moment(step, run.batches.epoch(step), "train", run.revision, policy_version=step - 1)
    with clock("report"):
        segments, dropped = write_segments(run.artifacts, moment, samples)
    compared = compare(run, groups, clock) if run.comparison else {}
    clock.seconds["wait"], run.journal.waited_seconds = run.journal.waited_seconds, 0.0
    if run.weights(step) != run.weights(step - 1):
        run.progress.lowest = run.progress.highest = None  # totals of another scale
    metrics = step_metrics(groups, result, mismatch, run.progress, clock.seconds) | evaluation.metrics | compared
    metrics |= scheduled_weights(run, step) | {f"reward/{name}/logs_dropped": n for name, n in dropped.items()}
    reward = metrics.get("total_reward", float("nan"))
    log.info("step %d of %d: total_reward %.4g, %.1f s", step, run.total_steps, reward, sum(clock.seconds.values()))
    return as_report(run, metrics, segments + evaluation.segments)


def begin_comparing(run: Run, step: int, groups: Sequence[Sequence[Sample]]) -> None:
    if run.comparison and run.comparison.over(step):
        run.stop_comparing()
    if run.comparison:
        run.comparison.begin(step, groups)


def compare(run: Run, groups: Sequence[Sequence[Sample]], clock: Clock) -> dict[str, float]:
    """What the revision before says of the step. Waiting for it is measured, and short."""
    assert run.comparison is not None
    with clock("compare"):
        metrics = run.comparison.metrics(run.progress.step, groups, sum(clock.seconds.values()))
    if verdict := run.comparison.verdict():
        run.stop_comparing()
        run.journal.event("info", verdict, step=run.progress.step)
    return metrics


def scheduled_weights(run: Run, step: int) -> dict[str, float]:
    """The weights in force, of functions that have one for each step."""
    weights = run.weights(step)
    return {f"reward/{f.name}/weight": weights[f.name] for f in run.rewards.functions if f.schedule}


def as_report(run: Run, metrics: dict[str, float], segments: list[Segment]) -> StepReport:
    step = run.progress.step
    epoch = run.batches.epoch(step)
    return StepReport(
        fence=run.journal.fence,
        step=step,
        epoch=epoch,
        total_steps=run.total_steps,
        steps_per_epoch=run.batches.steps_per_epoch,
        revision=run.revision,
        metrics=metrics | {"epoch": epoch} | run.forecast.after(step, metrics, run.revision),
        segments=segments,
    )


def pause_on_errors(run: Run, groups: Sequence[Sequence[Sample]]) -> None:
    if reason := run.guard.observe(sample.scores for group in groups for sample in group):
        # The server has to know of the pause before this job can wait for its end.
        run.journal.event("paused", reason, step=run.progress.step, wait=True)


def warn_without_signal(run: Run, groups: Sequence[Sequence[Sample]]) -> None:
    """Says it, once each time, when whole steps running had nothing to learn from."""
    silent = all(not sample.advantage for group in groups for sample in group)
    run.silent_steps = run.silent_steps + 1 if silent else 0
    if run.silent_steps == min(SILENT_STEPS, run.total_steps):
        message = (
            f"nothing was learned in {run.silent_steps} steps running: the completions of each prompt all score the "
            "same. Look at the scores, at the sampling temperature and at how hard the prompts are"
        )
        run.journal.event("warning", message, step=run.progress.step)


def save(run: Run, reward: float | None = None) -> None:
    """A checkpoint of the present step, `reward` being its held-out one. Raises JobError."""
    number = checkpoint.number_at(run.progress.step, run.config.save_every)
    progress = run.progress.with_checkpoint(number, reward)
    saved = checkpoint.publish(run.artifacts, run.learner.model, run.learner.optimizer, progress, number)
    run.journal.send(
        CheckpointReport(
            fence=run.journal.fence,
            checkpoint=number,
            step=progress.step,
            path=saved.path,
            state_path=saved.state_path,
            fingerprint=saved.fingerprint,
            eval_reward=reward,
            best=progress.best_checkpoint == number,
        )
    )
    run.progress = progress  # only now: the end of a run may name no checkpoint that the server has not heard of
    if run.journal.caught_up:
        checkpoint.delete_old_states(run.artifacts)


def obey(run: Run, patiently: bool = False) -> Ending | None:
    """What the server, the process's owner and the run itself have to say between two steps; None is to go on.

    `patiently`: no step is taken before a new revision has its packages.
    """
    progress = run.progress
    if progress.step >= run.total_steps:
        return "completed"
    patiently |= wait_while_paused(run)  # the functions that it was paused for are not to go on
    if run.yielding() or run.journal.control.action == "stop":
        if progress.step and progress.saved_step != progress.step:
            save(run)
        return "yielded" if run.yielding() else "stopped"
    if run.config.enable_early_stopping and exhausted(progress):
        message = f"stopped early: the held-out reward has not risen by {BETTER_BY} in {PATIENCE} evaluations"
        run.journal.event("info", message, step=progress.step)
        return "completed"
    wanted = run.journal.control.revision
    # Not only newer ones: when a revision is refused, the one before it may be news still.
    if wanted != run.revision and wanted not in run.refused:
        change_rewards(run, wanted, patiently)
    return None


def wait_while_paused(run: Run) -> bool:
    """Whether it was paused."""
    waited = False
    while run.journal.control.paused and run.journal.control.action == "continue" and not run.yielding():
        run.journal.wait(1.0)
        waited = True
    if waited:
        run.guard = ErrorGuard()
    return waited


def change_rewards(run: Run, number: int, patiently: bool) -> None:
    """Takes up a new revision for the steps to come; one that cannot be loaded changes nothing.

    While its packages are being installed the present one scores on, unless that is to be waited for `patiently`.
    """
    revision = run.journal.revision(number)
    if revision.refused:  # by an earlier attempt
        run.refused.add(number)
        return
    before, step = run.rewards, run.progress.step + 1
    if not before.scores_like(revision):
        if not patiently and not run.pools.ready(revision):
            return
        try:
            pool = run.pools.make(revision)
            pool.start()
        except (RewardPoolError, SandboxError) as error:
            run.refused.add(number)
            message = f"revision {number} is refused and changes nothing: {error.message}"
            run.journal.event("revision", message, revision=number, refused=error.message)
            return
        run.pool.close()
        run.pool = pool
    run.rewards, run.guard = revision, ErrorGuard()
    run.progress.use_revision(number)
    run.compare_with(before, step)
    run.journal.event("revision", f"revision {number} scores from step {step} on", revision=number, step=step)
