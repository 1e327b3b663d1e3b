"""Makes a `Run` from what the server says of the job: rows, model, adapters, engine, optimizer, reward pool, progress.

Whatever the user asked for that this run cannot or will not do is said once, in the job's events, when the first
attempt begins. The loop itself is in `loop`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rewardsmith.config import GRPOConfig
from rewardsmith.errors import DatasetError, RewardPoolError, SandboxError
from rewardsmith.rewards.outcomes import ErrorGuard
from rewardsmith.rewards.pool import RewardPool
from rewardsmith.rollout.engine import context_of
from rewardsmith.rollout.prompts import Prompt, make_prompts
from rewardsmith.train import checkpoint, lora
from rewardsmith.train.artifacts import JobArtifacts
from rewardsmith.train.checkpoint import Progress
from rewardsmith.train.comparison import Comparison, goes_on
from rewardsmith.train.data import Batches, read_rows, split_rows
from rewardsmith.train.forecast import Forecast
from rewardsmith.train.journal import Journal
from rewardsmith.train.learner import Learner
from rewardsmith.train.losses import dead_settings
from rewardsmith.train.model import load_base
from rewardsmith.train.parallel.ranks import Ranks
from rewardsmith.train.reward_pools import RewardPools
from rewardsmith.wire import JobSpec, Revision

log = logging.getLogger("rewardsmith.train")

RECOMMENDED_STEPS = 200  # contract 2.1


@dataclass
class Run:
    """All parts of a running job. `rewards` score the next step, `refused` are revisions that could not be loaded."""

    config: GRPOConfig
    journal: Journal
    artifacts: JobArtifacts
    learner: Learner
    max_tokens: int
    batches: Batches
    held_out: Sequence[Prompt]
    total_steps: int
    progress: Progress
    pools: RewardPools
    pool: RewardPool
    rewards: Revision
    yielding: Callable[[], bool]
    forecast: Forecast
    refused: set[int] = field(default_factory=set)
    guard: ErrorGuard = field(default_factory=ErrorGuard)
    silent_steps: int = 0  # steps running in which no group had any signal
    comparison: Comparison | None = None  # with the revision before

    @property
    def revision(self) -> int:
        return self.rewards.revision

    def weights(self, step: int) -> dict[str, float]:
        """Of every reward function at a step."""
        return {function.name: function.weight_at(step) for function in self.rewards.functions}

    def compare_with(self, before: Revision, first_step: int) -> None:
        """Score on what the present rewards changed, for as long as they say. That it cannot be done harms nothing."""
        self.stop_comparing()
        if not self.rewards.compared_steps:
            return
        comparison = Comparison(before, self.rewards, first_step, lambda changed: self.pools.make(changed, workers=1))
        try:
            comparison.start()
        except (RewardPoolError, SandboxError) as error:
            message = f"revision {before.revision} cannot be scored for comparison: {error.message}"
            self.journal.event("info", message, step=self.progress.step)
        else:
            self.comparison = comparison

    def stop_comparing(self) -> None:
        if self.comparison is not None:
            self.comparison.close()
        self.comparison = None


@contextmanager
def set_up(spec: JobSpec, journal: Journal, yielding: Callable[[], bool], ranks: Ranks) -> Iterator[Run]:
    """`yielding` says whether the process was asked to make room. Raises what ends a job: any RewardsmithError."""
    artifacts = JobArtifacts(spec)
    with (
        closing(RewardPools(spec, artifacts, journal)) as pools,
        _set_up(spec, journal, yielding, ranks, artifacts, pools) as run,
    ):
        yield run


@contextmanager
def _set_up(
    spec: JobSpec,
    journal: Journal,
    yielding: Callable[[], bool],
    ranks: Ranks,
    artifacts: JobArtifacts,
    pools: RewardPools,
) -> Iterator[Run]:
    config = GRPOConfig(**spec.params)
    pools.ready(spec.revision)  # if packages have to be installed, that goes on beside all this
    base, tokenizer = load_base(spec.base_model_source)
    context = context_of(base)
    train, held_out, left_out = _prompts(artifacts.get(spec.dataset_path), config, tokenizer, context)
    total_steps = config.total_steps(len(train))
    if spec.attempt == 1:
        for message in (*pools.remarks(), *_remarks(config, total_steps, train, held_out, left_out, context)):
            journal.event("warning", message)

    def warn(message: str) -> None:
        journal.event("warning", message)

    learner = Learner(
        base,
        tokenizer,
        config,
        base_name=spec.base_model_source,
        longest_prompt=max(len(prompt.ids) for prompt in [*train, *held_out]),
        ranks=ranks,
        between_tokens=journal.check,
        notice=warn,
    )
    if spec.resume:
        progress = checkpoint.restore(artifacts, spec.resume.state_path, learner.model, learner.optimizer)
        progress.last_checkpoint = spec.resume.checkpoint
    else:
        progress = Progress()
        if spec.continue_from_path:
            _continue_from(learner.model, artifacts, spec.continue_from_path, config)
    progress.use_revision(spec.revision.revision)
    learner.deliver(version=progress.step)

    pool = pools.make(spec.revision)
    pool.start()
    run = Run(
        config=config,
        journal=journal,
        artifacts=artifacts,
        learner=learner,
        max_tokens=min(config.sampling_params.max_tokens, context or config.sampling_params.max_tokens),
        batches=Batches(train, config.prompts_per_step, config.seed),
        held_out=held_out,
        total_steps=total_steps,
        progress=progress,
        pools=pools,
        pool=pool,
        rewards=spec.revision,
        yielding=yielding,
        forecast=Forecast(total_steps, config.save_every, len(held_out), config.effective_batch_size),
    )
    log.info("%d rows, %d held out, steps %d to %d", len(train), len(held_out), progress.step + 1, total_steps)
    if learner.path != "plain":  # that was said already, with the reason
        journal.event("info", f"what trains: {learner.path}", step=progress.step)
    if goes_on(spec.revision, progress.step + 1):
        before = journal.revision(cast(int, spec.revision.replaces))
        run.compare_with(before, cast(int, spec.revision.effective_step))
    try:
        yield run
    finally:
        run.stop_comparing()
        run.pool.close()


def _prompts(
    content: bytes, config: GRPOConfig, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> tuple[list[Prompt], list[Prompt], int]:
    """Prompts to train on, prompts to evaluate on, and how many rows were left out as too long."""
    limits = [limit for limit in (config.max_prompt_tokens, context and context - 1) if limit]
    longest = min(limits, default=None)
    parts = []
    left_out = 0
    for rows in split_rows(read_rows(content), config.eval_fraction, config.seed):
        prompts, too_long = make_prompts(
            rows, tokenizer, apply_chat_template=config.apply_chat_template, max_tokens=longest
        )
        parts.append(prompts)
        left_out += too_long
    if not parts[0]:
        raise DatasetError(f"every prompt has more than {longest} tokens; raise max_prompt_tokens or shorten them")
    return parts[0], parts[1], left_out


def _remarks(
    config: GRPOConfig,
    total_steps: int,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    left_out: int,
    context: int | None,
) -> Iterator[str]:
    """What the user should know of this config and these rows before the run, in plain words."""
    sampling, fields = config.sampling_params, GRPOConfig.model_fields
    longest = max(len(prompt.ids) for prompt in [*train, *held_out])
    if leaked := len({prompt.text for prompt in train} & {prompt.text for prompt in held_out}):
        yield f"{leaked} prompt(s) are both trained on and held out by the `split` column: held-out rewards flatter"
    if config.eval_fraction and any("split" in prompt.example for prompt in [*train, *held_out]):
        yield "eval_fraction cannot act: the dataset's `split` column says which rows are held out"
    if left_out:
        yield f"{left_out} row(s) left out: their prompts are too long for max_prompt_tokens or the model's context"
    if context and longest + sampling.max_tokens > context:
        yield (
            f"max_tokens={sampling.max_tokens} is cut to what the model's context of {context} tokens leaves after "
            f"each prompt: {context - longest} after the longest"
        )
    if config.enable_early_stopping and not held_out:
        yield "early stopping cannot act: no rows are held out (a `split` column or eval_fraction names some)"
    scheduler = config.lr_scheduler
    if scheduler.num_cycles > 1 and scheduler.type != "cosine_with_restarts":
        yield f"num_cycles={scheduler.num_cycles} cannot act: only lr_scheduler cosine_with_restarts has cycles"
    if scheduler.type == "constant" and config.warmup_ratio not in (0, fields["warmup_ratio"].default):
        yield f"warmup_ratio={config.warmup_ratio} cannot act with lr_scheduler constant: use constant_with_warmup"
    if "8bit" in config.optimizer.type or "paged" in config.optimizer.type:
        yield f"optimizer {config.optimizer.type}: AdamW runs with 32-bit states in ordinary memory"
    yield from dead_settings(config)
    if total_steps < RECOMMENDED_STEPS:
        yield f"{total_steps} steps are fewer than the recommended {RECOMMENDED_STEPS}"


def _continue_from(model: PeftModel, artifacts: JobArtifacts, path: str, config: GRPOConfig) -> None:
    with tempfile.TemporaryDirectory(prefix="rewardsmith-adapter-") as folder:
        artifacts.fetch_folder(path, (lora.CONFIG_FILE, lora.WEIGHTS_FILE), Path(folder))
        lora.continue_from(model, Path(folder), config)
