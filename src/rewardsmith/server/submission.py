"""From what a user sent to what a job runs: a checked, complete config and reward functions that really load.

`check_job` is for a new job, `check_change` for a live change of one. Both refuse with a sentence that names the
field and the fix; nothing is stored here. What is inherited from the adapter that a run continues: contract 2.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from rewardsmith import catalog, wire
from rewardsmith.config import DEFAULT_TRAIN_STEPS, GRPOConfig
from rewardsmith.errors import ConfigError, RewardPoolError, RewardSourceError
from rewardsmith.reward_config import RewardFunctionsConfig
from rewardsmith.rewards.pool import RewardPool
from rewardsmith.store import Store

# They shape the adapter that a continued run starts from.
FIXED_WHEN_CONTINUING = ("base_model", "rank", "lora_alpha", "target_modules")


@dataclass(frozen=True)
class Change:
    """Reward functions that may be used. `params` is the whole config with them, as it is stored."""

    params: dict[str, Any]
    functions: list[wire.RevisionFunction]


@dataclass(frozen=True)
class Submission(Change):
    """A job that may be created."""

    dataset: str
    base_model: str
    base_model_source: str


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
    if config.secrets:
        raise ConfigError("secrets are not supported: this server has no place to keep them safe. Leave the field out")
    base_model_source = catalog.source_of(config.base_model)
    _check_context(config, config.base_model)
    store.datasets.get(dataset)
    if config.train_steps is None and config.epochs is None:
        config.train_steps = DEFAULT_TRAIN_STEPS
    return Submission(
        params=config.model_dump(mode="json", by_alias=True),
        dataset=dataset,
        base_model=config.base_model,
        base_model_source=base_model_source,
        functions=_checked_functions(config.reward_fns),
    )


def check_change(job: wire.Job, sent: dict[str, Any]) -> Change | None:
    """The reward functions of `sent` in the config of `job`; None when they are those it has.

    A field that is missing or None in `sent` keeps its value, and so do settings of a function that keeps its name.
    Raises ConfigError naming every other field that differs.
    """
    stored, change = GRPOConfig(**job.params), GRPOConfig(**sent)
    before = stored.model_dump(mode="json")
    differing = sorted(_differences(change.model_dump(mode="json", exclude_unset=True, exclude={"reward_fns"}), before))
    if differing:
        raise ConfigError(
            f"only reward_fns can change while a job runs; these differ from its config: {', '.join(differing)}. "
            "Start a new job for them, with continue_from_version to go on from here"
        )
    if "reward_fns" not in change.model_fields_set:
        return None
    rewards = _merged(stored.reward_fns, change.reward_fns)
    if rewards == stored.reward_fns:
        return None
    functions = _checked_functions(rewards)
    stored.reward_fns = rewards
    return Change(params=stored.model_dump(mode="json", by_alias=True), functions=functions)


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


def _merged(stored: RewardFunctionsConfig, sent: RewardFunctionsConfig) -> RewardFunctionsConfig:
    """The functions that were sent, with what they leave unset taken from the stored one of the same name.

    The stock SDK sends sources and nothing else, also of functions that it did not touch (contract 1.6).
    """
    functions = {}
    for name, function in sent.functions.items():
        inherited = stored.functions[name].model_dump() if name in stored.functions else {}
        functions[name] = {**inherited, **function.model_dump(exclude_unset=True)}
    runtime = sent.runtime if "packages" in sent.runtime.model_fields_set else stored.runtime
    return RewardFunctionsConfig(functions=functions, runtime=runtime)


def _differences(sent: Mapping[str, Any], stored: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in sent.items():
        if isinstance(value, Mapping) and isinstance(stored[name], Mapping):
            yield from _differences(value, stored[name], f"{above}{name}.")
        elif value is not None and value != stored[name]:
            yield above + name


def _checked_functions(rewards: RewardFunctionsConfig) -> list[wire.RevisionFunction]:
    """The set as a revision keeps it, after every function has been loaded as the job loads it."""
    if not rewards.functions:
        raise ConfigError("reward_fns has no functions; a run needs at least one")
    for package in rewards.runtime.packages:
        _require_installed(package)
    functions = [
        wire.RevisionFunction(
            name=name,
            source=function.source,
            source_sha256=hashlib.sha256(function.source.encode()).hexdigest(),
            weight=function.weight,
            on_error=function.on_error,
            none=function.none,
        )
        for name, function in rewards.functions.items()
    ]
    try:
        with RewardPool(functions, workers=1):
            return functions
    except RewardPoolError as error:
        raise RewardSourceError(error.message) from None


def _require_installed(package: str) -> None:
    """Raises ConfigError for a requirement that the server's own environment does not satisfy."""
    field = f"reward_fns.runtime.packages: {package!r}"
    try:
        requirement = Requirement(package)
    except InvalidRequirement as error:
        raise ConfigError(f"{field} is no pip requirement: {error}") from None
    if requirement.url:
        raise ConfigError(f"{field} is a URL; name a package that is installed where the server runs")
    if requirement.marker and not requirement.marker.evaluate():
        return
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"{field} is not installed where the server runs, and packages are not installed for a job; "
            f"run `pip install {requirement.name}` there"
        ) from None
    if not requirement.specifier.contains(installed, prereleases=True):
        raise ConfigError(f"{field} does not fit the installed version {installed}")
