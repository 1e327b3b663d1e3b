"""The training loop. Read this first.

GRPO with one update per batch: no value model, no old policy, no replay; the reference is the model with its adapter
off. A step is a function of the weights and the step's number, which is why a killed job goes on to the same numbers.
Set up in `setup`; the mathematics is in `grpo`, what leaves the process goes through `journal`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Literal, cast

import torch
from transformers import PreTrainedModel

from rewardsmith.errors import DeliveryError, RewardPoolError
from rewardsmith.rewards.outcomes import ErrorGuard
from rewardsmith.rewards.pool import RewardPool
from rewardsmith.train import checkpoint
from rewardsmith.train.batch import Example
from rewardsmith.train.evaluate import BETTER_BY, PATIENCE, evaluate, exhausted, note_evaluation
from rewardsmith.train.lora import deliver
from rewardsmith.train.metrics import Clock, Mismatch, step_metrics
from rewardsmith.train.samples import Sample, examples, generate, score, with_advantages
from rewardsmith.train.segments import Moment, write_segments
from rewardsmith.train.setup import Run
from rewardsmith.train.update import Update, policy_logps, update
from rewardsmith.wire import CheckpointReport, Segment, StepReport

log = logging.getLogger("rewardsmith.train")

Ending = Literal["completed", "stopped", "yielded"]

PROBES = 4  # completions of each step whose log-probs the trainer computes again
# Mean difference of log-probs per token at which the engine must be running something else: ten times and more above
# what the two paths differ by in rounding.
MISMATCH_LIMIT = {torch.float64: 0.01, torch.float32: 0.01, torch.bfloat16: 0.2, torch.float16: 0.1}


def train(run: Run) -> Ending:
    """From where the run stands to its end. Raises JobCanceled, LeaseLost, ServerLost and what else ends a job."""
    run.journal.beat()  # what happened before this attempt: a pause, a new revision
    if run.progress.step == 0 and run.held_out:
        report_base(run)
    ending = obey(run)
    while ending is None:
        step, clock = run.progress.step + 1, Clock()
        prompts = run.batches.take(step)
        with clock("generate"):
            config = run.config
            drawn = generate(run.engine, prompts, config.num_generations, config.sampling_params, config.seed, step)
        with clock("score"):
            groups = with_advantages(score(run.pool, prompts, drawn), config)
        with clock("update"):
            batch = examples(groups, config, run.max_tokens)
            mismatch = compare(run, groups, batch)
            result = update(
                run.model, run.optimizer, batch, config, vocab=run.vocab, step=step, total_steps=run.total_steps
            )
        with clock("deliver"):
            deliver(run.model, run.engine, version=step)
        run.progress.step = step
        report(run, groups, result, mismatch, clock)
        ending = obey(run)
    return ending


def compare(run: Run, groups: Sequence[Sequence[Sample]], batch: Sequence[Example]) -> Mismatch:
    """Log-probs of some completions under engine and trainer. Raises DeliveryError when they are of two policies."""
    samples = [sample for group in groups for sample in group]
    every = max(1, len(samples) // PROBES)
    trainer_N = torch.cat(policy_logps(run.model, batch[::every][:PROBES], run.config, run.vocab)).float().cpu()
    sampler_N = torch.tensor([logp for sample in samples[::every][:PROBES] for logp in sample.completion.logps])
    mismatch = Mismatch.of(trainer_N, sampler_N, run.config.clip_low, run.config.clip_high)
    limit = MISMATCH_LIMIT[cast(PreTrainedModel, run.model.get_base_model()).dtype]
    if not mismatch.mean_difference <= limit:
        raise DeliveryError(
            f"engine and trainer do not run the same policy: the log-probs of the same tokens differ by "
            f"{mismatch.mean_difference:.3g} on average in step {run.progress.step + 1}, more than {limit}"
        )
    return mismatch


def report_base(run: Run) -> None:
    """Step 0: the held-out rows under the policy that training starts from."""
    segments, metrics = held_out(run, None)
    send(run, 0, metrics, segments)


def report(run: Run, groups: Sequence[Sequence[Sample]], result: Update, mismatch: Mismatch, clock: Clock) -> None:
    """Tells the server of the step that was just taken; when one is due, with an evaluation and a checkpoint."""
    progress, step = run.progress, run.progress.step
    samples = [sample for group in groups for sample in group]
    moment = Moment(step, run.batches.epoch(step), "train", run.revision, policy_version=step - 1)
    with clock("report"):
        segments = write_segments(run.artifacts, moment, samples)
    held_out_metrics: dict[str, float] = {}
    saves = step % run.config.save_every == 0 or step == run.total_steps
    number = checkpoint.number_at(step, run.config.save_every)
    if saves and run.held_out:
        more, held_out_metrics = held_out(run, number)
        segments += more
    clock.seconds["report"] += run.send_seconds
    clock.seconds["wait"], run.journal.waited_seconds = run.journal.waited_seconds, 0.0
    metrics = step_metrics(groups, result, mismatch, progress, clock.seconds) | held_out_metrics
    reward = metrics.get("total_reward", float("nan"))
    log.info("step %d of %d: total_reward %.4g, %.1f s", step, run.total_steps, reward, sum(clock.seconds.values()))
    started = time.perf_counter()
    send(run, step, metrics, segments)
    if saves:
        save(run, held_out_metrics.get("eval/total_reward"))
    if reason := run.guard.observe(sample.scores for sample in samples):
        # The server has to know of the pause before this job can wait for its end.
        run.journal.event("paused", reason, step=step, wait=True)
    run.send_seconds = time.perf_counter() - started


def held_out(run: Run, number: int | None) -> tuple[list[Segment], dict[str, float]]:
    """Evaluates the present policy, whose checkpoint gets `number`."""
    step = run.progress.step
    samples = evaluate(run.engine, run.pool, run.held_out, run.config)
    moment = Moment(step, run.batches.epoch(step), "eval", run.revision, policy_version=step)
    return write_segments(run.artifacts, moment, samples), note_evaluation(run.progress, samples, number)


def send(run: Run, step: int, metrics: dict[str, float], segments: list[Segment]) -> None:
    epoch = run.batches.epoch(step)
    run.journal.send(
        StepReport(
            fence=run.journal.fence,
            step=step,
            epoch=epoch,
            total_steps=run.total_steps,
            steps_per_epoch=run.batches.steps_per_epoch,
            revision=run.revision,
            metrics=metrics | {"epoch": epoch},
            segments=segments,
        )
    )


def save(run: Run, reward: float | None = None) -> None:
    """A checkpoint of the present step, `reward` being its held-out one."""
    progress = run.progress
    number = checkpoint.number_at(progress.step, run.config.save_every)
    progress.last_checkpoint, progress.saved_step = number, progress.step
    saved = checkpoint.publish(run.artifacts, run.model, run.optimizer, progress, number)
    run.journal.send(
        CheckpointReport(
            fence=run.journal.fence,
            checkpoint=number,
            step=progress.step,
            path=saved.path,
            state_path=saved.state_path,
            fingerprint=saved.fingerprint,
            eval_reward=reward,
            best=reward is not None and progress.best_checkpoint == number,
        )
    )
    if run.journal.caught_up:
        checkpoint.delete_old_states(run.artifacts)


def obey(run: Run) -> Ending | None:
    """What the server, the process's owner and the run itself have to say between two steps; None is to go on."""
    progress = run.progress
    if progress.step >= run.total_steps:
        return "completed"
    wait_while_paused(run)
    if run.yielding() or run.journal.control.action == "stop":
        if progress.step and progress.saved_step != progress.step:
            save(run)
        return "yielded" if run.yielding() else "stopped"
    if run.config.enable_early_stopping and exhausted(progress):
        message = f"stopped early: the held-out reward has not risen by {BETTER_BY} in {PATIENCE} evaluations"
        run.journal.event("info", message, step=progress.step)
        return "completed"
    if run.journal.control.revision > run.newest:
        change_rewards(run, run.journal.control.revision)
    return None


def wait_while_paused(run: Run) -> None:
    waited = False
    while run.journal.control.paused and run.journal.control.action == "continue" and not run.yielding():
        run.journal.wait(1.0)
        waited = True
    if waited:
        run.guard = ErrorGuard()


def change_rewards(run: Run, number: int) -> None:
    """Takes up a new revision for the steps to come; one that cannot be loaded changes nothing."""
    run.newest = number
    revision = run.journal.revision(number)
    if revision.refused:
        return  # by an earlier attempt
    pool = RewardPool(revision.functions)
    try:
        pool.start()
    except RewardPoolError as error:
        message = f"revision {number} is refused and changes nothing: {error.message}"
        run.journal.event("revision", message, revision=number, refused=error.message)
        return
    run.pool.close()
    run.pool, run.revision, run.guard = pool, number, ErrorGuard()
    run.progress.lowest = run.progress.highest = None
    step = run.progress.step + 1
    run.journal.event("revision", f"revision {number} scores from step {step} on", revision=number, step=step)
