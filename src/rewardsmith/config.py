"""The configuration classes that users write and the server stores: names and defaults of contract 1.6, plus our own.

Every default stands here and nowhere else; a field left out or given as None takes it. `to_wire()` sends only what
was set, so the server knows what to inherit when a run continues another one. Unknown fields and illegal
combinations raise ConfigError when the object is built. Nothing here touches the network or the disk.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rewardsmith.errors import ConfigError, RewardSourceError
from rewardsmith.rewards import source as reward_source
from rewardsmith.section import Section

DEFAULT_TRAIN_STEPS = 1000
RESERVED_REWARD_NAMES = {"total_reward", "total_reward_std"}


class SamplingParamsConfig(Section):
    """How completions are sampled. `max_tokens` counts new tokens; `top_k` 0 and `top_p` 1.0 switch the cut off."""

    temperature: float = Field(default=1.0, gt=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=10_000_000)
    max_tokens: int = Field(default=1024, ge=1, le=10_000_000)


class RewardFunction(Section):
    """One reward function as it travels: its source text in base64, its weight, and what its failures count.

    `on_error` applies to not_a_number, exception, timeout, crash, out_of_memory and output_limit: "zero" scores 0,
    "exclude" leaves the completion out of its group, "fail" ends the job. `none="abstain"` lets a function
    return None to say that it has no opinion.
    """

    encoded_fn: str = Field(alias="encodedFn")
    weight: float = Field(default=1.0, allow_inf_nan=False)
    on_error: Literal["zero", "exclude", "fail"] = "zero"
    none: Literal["error", "abstain"] = "error"

    @field_validator("encoded_fn")
    @classmethod
    def _is_source(cls, value: str) -> str:
        try:
            base64.b64decode(value, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise ValueError("encodedFn is not base64 of UTF-8 source text") from None
        return value

    @classmethod
    def from_source(cls, text: str, **settings: Any) -> Self:
        """From source text with one top-level function. Raises RewardSourceError with lines and fixes."""
        problems = reward_source.check(text)
        if problems:
            raise RewardSourceError("\n".join(str(problem) for problem in problems))
        return cls(encoded_fn=base64.b64encode(text.encode()).decode(), **settings)

    @classmethod
    def from_callable(cls, function: Callable[..., Any], **settings: Any) -> Self:
        """From a plain function `(prompt, completion, example)`. Raises RewardSourceError with lines and fixes."""
        try:
            text = reward_source.source_of(function)
        except reward_source.SourceError as error:
            raise RewardSourceError(str(error)) from None
        return cls.from_source(text, **settings)

    @property
    def source(self) -> str:
        return base64.b64decode(self.encoded_fn).decode()

    @property
    def function(self) -> Callable[..., Any]:
        """The function made again from its source. This runs the text: only for sources you trust."""
        return reward_source.compile_function(self.source, "<reward function>")


class RewardFunctionsRuntimeConfig(Section):
    """What the reward processes need: `packages` are pip requirement lines."""

    packages: list[str] = Field(default_factory=list)


def _as_reward(name: object, value: object) -> RewardFunction:
    if not isinstance(name, str) or not name or len(name) > 100 or not name.isprintable():
        raise ConfigError(f"a reward function's name is a printable text of 1 to 100 characters, not {name!r}")
    if name in RESERVED_REWARD_NAMES:
        raise ConfigError(f"{name!r} is the name of a metric; give the reward function another one")
    if isinstance(value, RewardFunction):
        return value
    if isinstance(value, Mapping):
        return RewardFunction(**value)
    if callable(value):
        try:
            return RewardFunction.from_callable(value)
        except RewardSourceError as error:
            raise RewardSourceError(f"reward function {name!r}: {error.message}") from None
    raise ConfigError(f"reward function {name!r} is a {type(value).__name__}; give a function or a RewardFunction")


def _named(functions: object) -> dict[str, object]:
    """Any accepted form of a set of functions, as name -> function in the order given."""
    if isinstance(functions, Mapping):
        return dict(functions)
    if callable(functions):
        functions = [functions]
    if not isinstance(functions, (list, tuple)):
        raise ConfigError(f"reward functions are a dict, a list or one function, not a {type(functions).__name__}")
    named: dict[str, object] = {}
    for function in functions:
        name = getattr(function, "__name__", None)
        if name is None:
            raise ConfigError(f"a {type(function).__name__} in a list has no name; give a dict, {{name: function}}")
        if name in named:
            raise ConfigError(f"two reward functions are named {name!r}; give a dict with two names")
        named[name] = function
    return named


class RewardFunctionsConfig(Section):
    """The set of reward functions, by name, in display order. `cfg["name"] = function` and `del cfg["name"]` work.

    `functions` takes a dict, a list of functions (named by `__name__`) or one function.
    """

    runtime: RewardFunctionsRuntimeConfig = Field(default_factory=RewardFunctionsRuntimeConfig)
    functions: dict[str, RewardFunction] = Field(default_factory=dict)
    _MEANT: ClassVar[dict[str, str]] = {"weight": "RewardFunction.weight"}

    @field_validator("functions", mode="before")
    @classmethod
    def _any_form(cls, value: object) -> dict[str, RewardFunction]:
        return {name: _as_reward(name, function) for name, function in _named(value).items()}

    @classmethod
    def of(cls, value: object) -> RewardFunctionsConfig:
        """From any accepted form, also a bare `{name: function}` or a list."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and (
            isinstance(value.get("functions"), (Mapping, list, tuple)) or set(value) == {"runtime"}
        ):
            return cls(**value)
        return cls(functions=value)

    def __getitem__(self, name: str) -> RewardFunction:
        return self.functions[name]

    def __setitem__(self, name: str, function: object) -> None:
        self.functions = {**self.functions, name: _as_reward(name, function)}

    def __delitem__(self, name: str) -> None:
        if name not in self.functions:
            raise KeyError(name)
        self.functions = {key: value for key, value in self.functions.items() if key != name}

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(self.functions)

    def __len__(self) -> int:
        return len(self.functions)

    def __contains__(self, name: object) -> bool:
        return name in self.functions


class SchedulerConfig(Section):
    """Learning rate over the steps, after a linear warm-up of `warmup_ratio`."""

    type: Literal["linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup"] = "linear"
    num_cycles: int = Field(default=1, ge=1)

    @classmethod
    def _unfolded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return _without_params_level(fields)


class OptimizerConfig(Section):
    """AdamW. The 8-bit and paged names of the original are accepted; the job says which states it really keeps."""

    type: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = (
        "paged_adamw_8bit"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)

    @classmethod
    def _unfolded(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return _without_params_level(fields)


def _without_params_level(fields: dict[str, Any]) -> dict[str, Any]:
    """The original's `{"type": ..., "params": {...}}` as one level."""
    params = fields.get("params")
    if not isinstance(params, Mapping):
        return fields
    return {**{name: value for name, value in fields.items() if name != "params"}, **params}


class GRPOConfig(Section):
    """One GRPO run. Lengths are tokens, batch sizes are completions, steps are optimizer steps.

    Without `train_steps` and `epochs` a run has 1000 steps; with both, `train_steps` wins. `effective_batch_size`
    counts completions: a step takes `effective_batch_size / num_generations` prompts.
    """

    _MEANT: ClassVar[dict[str, str]] = {
        "lr": "learning_rate",
        "max_steps": "train_steps",
        "rollouts_per_prompt": "num_generations",
        "gradient_accumulation_steps": "effective_batch_size",
        "per_device_train_batch_size": "effective_batch_size",
        "max_completion_length": "sampling_params.max_tokens",
        "weight": "RewardFunction.weight",
    }

    # The original's fields (contract 1.6).
    task: Literal["grpo"] = "grpo"
    base_model: str | None = Field(default=None, min_length=1)
    adapter: Literal["lora"] = "lora"
    epochs: int | None = Field(default=None, ge=1, le=100_000)
    train_steps: int | None = Field(default=None, ge=1, le=1_000_000)
    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    rank: int = Field(default=64, ge=1, le=1024)
    target_modules: list[str] | None = Field(default=None, min_length=1)
    lora_alpha: int = Field(default=64, ge=1, le=100_000)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    enable_early_stopping: bool = True
    apply_chat_template: bool = False
    lr_scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    effective_batch_size: int = Field(default=16, ge=2, le=65_536)
    beta: float = Field(default=0.001, ge=0, le=1)
    num_generations: int = Field(default=16, ge=2, le=65_536)
    sampling_params: SamplingParamsConfig = Field(default_factory=SamplingParamsConfig)
    reward_fns: RewardFunctionsConfig = Field(default_factory=RewardFunctionsConfig, alias="rewardFns")
    secrets: dict[str, str] = Field(default_factory=dict)

    # Our own.
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    advantage: Literal["group_std", "group_mean", "batch_std"] = "group_std"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    eval_fraction: float = Field(default=0.0, ge=0, le=0.5)
    max_prompt_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    save_every: int = Field(default=20, ge=1, le=1_000_000)

    @field_validator("reward_fns", mode="before")
    @classmethod
    def _any_reward_form(cls, value: object) -> RewardFunctionsConfig:
        return RewardFunctionsConfig.of(value)

    @field_validator("secrets", mode="before")
    @classmethod
    def _secrets_are_text(cls, value: object) -> object:
        return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="before")
    @classmethod
    def _lora_only(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("adapter", "lora") != "lora":
            raise ValueError(f"GRPOConfig.adapter: {value['adapter']!r} cannot be trained with GRPO; use 'lora'")
        return value

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        batch, group = self.effective_batch_size, self.num_generations
        # Without a base model it continues another run, which may have set the one that is not set here.
        inherits = self.base_model is None and not {"effective_batch_size", "num_generations"} <= self.model_fields_set
        if batch % group and not inherits:
            lower, upper = batch // group * group, (batch // group + 1) * group
            valid = f"{lower} or {upper}" if lower else f"{upper}"
            default = "" if "effective_batch_size" in self.model_fields_set else " (the default)"
            raise ValueError(
                f"GRPOConfig.effective_batch_size={batch}{default} is not a multiple of num_generations={group}: "
                f"a step takes whole groups. Nearest valid: effective_batch_size={valid}"
            )
        return self

    @property
    def prompts_per_step(self) -> int:
        return self.effective_batch_size // self.num_generations

    def total_steps(self, train_rows: int) -> int:
        """Optimizer steps of the run over `train_rows` rows; the last step of an epoch may reach into the next."""
        if self.train_steps is not None:
            return self.train_steps
        if self.epochs is not None:
            return max(1, -(-self.epochs * train_rows // self.prompts_per_step))
        return DEFAULT_TRAIN_STEPS

    def continued_by(self, child: GRPOConfig) -> GRPOConfig:
        """These settings with what `child` sets on top (contract 2.2); a set of reward functions is replaced whole."""
        inherited, changes = self.to_wire(), child.to_wire()
        if {"train_steps", "epochs"} & changes.keys():
            inherited = {name: value for name, value in inherited.items() if name not in ("train_steps", "epochs")}
        for name, value in changes.items():
            whole = name == "rewardFns" or not isinstance(value, dict)
            inherited[name] = value if whole else {**inherited.get(name, {}), **value}
        return GRPOConfig(**inherited)
