"""From what a user sent to what a job runs: a checked, complete config and reward functions that really load.

`check_job` is for a new job; a live change of one is in `changes`. Refusals are sentences that name the field and the
fix; nothing is stored here. What is inherited from the adapter that a run continues: contract 2.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rewardsmith import catalog, wire
from rewardsmith.config import DEFAULT_TRAIN_STEPS, STORED, GRPOConfig, hidden_secret
from rewardsmith.errors import ConfigError, RewardPoolError, RewardSourceError
from rewardsmith.reward_config import RewardFunctionsConfig
from rewardsmith.rewards import packages, source
from rewardsmith.rewards.pool import RewardPool
from rewardsmith.store import Store

# They shape the adapter that a continued run starts from.
FIXED_WHEN_CONTINUING = ("base_model", "rank", "lora_alpha", "target_modules")


@dataclass(frozen=True)
class Change:
    """Reward functions that may be used. `params` is the whole config with them, as it is stored: without secrets."""

    params: dict[str, Any]
    functions: list[wire.RevisionFunction]


@dataclass(frozen=True)
class Submission(Change):
    """A job that may be created."""

    dataset: str
    base_model: str
    base_model_source: str
    secrets: dict[str, str] = field(repr=False)


def check_job(request: wire.JobRequest, store: Store) -> Submission:
    """Raises ConfigError, RewardSourceError, or NotFound for a dataset or version that is not there."""
    config, dataset = GRPOConfig(**request.params), request.dataset
    if request.continue_from_version:
        parent = _parent(request.continue_from_version, store)
        config, dataset = _continued(parent, config), dataset or parent.dataset_name
    if config.base_model is None:
        raise ConfigError("base_model is not set; only a run that continues a version may leave it out")
    if dataset is None:
        raise ConfigError("dataset is not set; only a run that continues a version may leave it out")
    base_model_source = catalog.source_of(config.base_model)
    _check_context(config, config.base_model)
    store.datasets.get(dataset)
    if config.train_steps is None and config.epochs is None:
        config.train_steps = DEFAULT_TRAIN_STEPS
    return Submission(
        params=_without_secrets(config),
        secrets=config.secrets,
        dataset=dataset,
        base_model=config.base_model,
        base_model_source=base_model_source,
        functions=checked_functions(config.reward_fns),
    )


def _parent(ref: str, store: Store) -> wire.Job:
    """The job that made the version to continue. Raises NotFound when there is no adapter to start from."""
    version_id = wire.AdapterId.parse(ref)
    store.registry.adapter_path(version_id.repo, version_id.tag, version_id.checkpoint)
    job = store.registry.get_version(version_id.repo, version_id.tag, version_id.checkpoint).finetuning_job
    if job is None:
        raise ConfigError(f"{ref} was not made by a job, so there is no config to continue")
    return store.runs.get(job.uuid)


def _continued(parent: wire.Job, child: GRPOConfig) -> GRPOConfig:
    before = GRPOConfig(**parent.params)
    config = before.continued_by(child)
    changed = [name for name in FIXED_WHEN_CONTINUING if getattr(config, name) != getattr(before, name)]
    if changed:
        said = ", ".join(f"{name}={getattr(before, name)!r}" for name in changed)
        raise ConfigError(f"a run that continues a version keeps the shape of its adapter: {said}; leave these out")
    return config


def _check_context(config: GRPOConfig, base_model: str) -> None:
    """A length that nobody chose is cut by the job, which says so; one that was chosen and cannot be is refused."""
    known, sampling = catalog.ALIASES.get(base_model), config.sampling_params
    if known and sampling.max_tokens >= known.context and "max_tokens" in sampling.model_fields_set:
        raise ConfigError(
            f"sampling_params.max_tokens={sampling.max_tokens} leaves no room for a prompt: {base_model} has a context "
            f"of {known.context} tokens for prompt and completion together"
        )


def _without_secrets(config: GRPOConfig) -> dict[str, Any]:
    """The whole config, with names only where values were given."""
    shown = {name: value if value.startswith(STORED) else hidden_secret(name) for name, value in config.secrets.items()}
    return config.model_dump(mode="json", by_alias=True) | {"secrets": shown}


def checked_functions(rewards: RewardFunctionsConfig) -> list[wire.RevisionFunction]:
    """The set as a revision keeps it, after every function has been loaded as the job loads it.

    Where packages have to be installed first, only the texts are checked: the job installs them before it loads.
    """
    if not rewards.functions:
        raise ConfigError("reward_fns has no functions; a run needs at least one")
    functions = as_revision(rewards)
    environment = packages.at_hand(rewards.runtime.packages)
    if environment is None:
        _check_texts(functions)
        return functions
    try:
        with (
            environment,
            RewardPool(functions, workers=1, runtime=rewards.runtime, site_dirs=environment.folders),
        ):
            return functions
    except RewardPoolError as error:
        raise RewardSourceError(error.message) from None


def _check_texts(functions: Sequence[wire.RevisionFunction]) -> None:
    for function in functions:
        problems = source.check(function.source, per=function.per)
        if problems:
            raise RewardSourceError(f"reward function {function.name!r}: " + "\n".join(map(str, problems)))


def as_revision(rewards: RewardFunctionsConfig) -> list[wire.RevisionFunction]:
    """The functions in the form that travels to the job, not loaded yet."""
    return [
        wire.RevisionFunction(
            name=name,
            source=function.source,
            source_sha256=hashlib.sha256(function.source.encode()).hexdigest(),
            **function.model_dump(exclude={"encoded_fn"}),
        )
        for name, function in rewards.functions.items()
    ]
