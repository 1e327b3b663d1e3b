"""The configuration classes that users write and the server stores: names and defaults of contract 1.6, plus our own.

Every default stands here and nowhere else; a field left out or given as None takes it. `to_wire()` sends only what
was set, so the server knows what to inherit when a run continues another one. Unknown fields and illegal
combinations raise ConfigError when the object is built. Nothing here touches the network or the disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rewardsmith.reward_config import RewardFunctionsConfig
from rewardsmith.section import Section

# What the losses can be told to do, by name; the formulas are in `train.grpo` and `train.losses`.
Loss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"]
Advantage = Literal["group_std", "group_mean", "batch_std", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
KLEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["none", "truncate", "mask"]
Level = Literal["token", "sequence"]

DEFAULT_TRAIN_STEPS = 1000
INFINITE = float("inf")
# How far below and above 1 the ratio of new to old policy may act by default (docs/losses.md).
CLIP_BOUNDS = dict.fromkeys(("grpo", "bnpo", "dr_grpo"), (0.2, 0.2)) | {
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (INFINITE, 4.0),
    "sapo": (INFINITE, INFINITE),
}
# What was chosen for a value of another field and is not inherited with a new one.
CHOSEN_FOR = {"loss": {"clip_low", "clip_high", "dual_clip"}, "overlong": {"overlong_buffer"}}

# Secrets become environment variables of the reward functions. A value that begins with STORED names a stored one.
STORED = "secret:"
LONGEST_SECRET = 65_536  # bytes
MOST_SECRETS = 100
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_TAKEN = re.compile(r"(?i:REWARDSMITH_.*|LD_.*|PYTHON.*|PATH|HOME|TMPDIR|(http|https|all|no)_proxy)")


def hidden_secret(name: str) -> str:
    """What is shown in the place of a secret's value."""
    return f"[secret {name}]"


class SamplingParamsConfig(Section):
    """How completions are sampled. `max_tokens` counts new tokens; `top_k` 0, `top_p` 1.0 and `min_p` 0.0 cut nothing.

    `min_p` leaves out tokens less likely than this share of the likeliest; a completion ends before a text in `stop`.
    """

    temperature: float = Field(default=1.0, gt=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=10_000_000)
    max_tokens: int = Field(default=1024, ge=1, le=10_000_000)
    min_p: float = Field(default=0.0, ge=0, le=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=16)


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


class SamplerCorrectionConfig(Section):
    """What tokens weigh that the sampler draws with other probabilities than the trainer's: the ratio of the two, at
    most `high` and at least `low` ("truncate"), or 0 outside of them ("mask"). Without a `mode` the job decides by the
    precision it runs in. `level` is by default the token, with loss gspo the sequence; `low` is 0.5 for a mask, else 0.
    """

    mode: Correction | None = None
    level: Level | None = None
    low: float | None = Field(default=None, ge=0, le=1)
    high: float = Field(default=2.0, ge=1)

    @property
    def lowest(self) -> float:
        return self.low if self.low is not None else 0.5 if self.mode == "mask" else 0.0


class GRPOConfig(Section):
    """One GRPO run. Lengths are tokens, batch sizes are completions; a step learns from one batch.

    Without `train_steps` and `epochs` a run has 1000 steps; with both, `train_steps` wins. `effective_batch_size`
    counts completions: a step takes `effective_batch_size / num_generations` prompts. The fields of the loss are
    explained in docs/losses.md.

    `secrets` are environment variables that the reward functions of this job see, and nobody else: `{NAME: value}`,
    `{NAME: "secret:KEY"}` for the value that is stored under KEY (`rs.secrets`), or `[KEY, ...]` for stored ones under
    their own names. Values are kept encrypted and never shown: a config that comes back has `[secret NAME]` for them.
    """

    _MEANT: ClassVar[dict[str, str]] = {
        "lr": "learning_rate",
        "max_steps": "train_steps",
        "rollouts_per_prompt": "num_generations",
        "gradient_accumulation_steps": "effective_batch_size",
        "per_device_train_batch_size": "effective_batch_size",
        "max_completion_length": "sampling_params.max_tokens",
        "num_iterations": "updates_per_batch",
        "loss_type": "loss",
        "epsilon": "clip_low",
        "epsilon_high": "clip_high",
        "delta": "dual_clip",
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
    secrets: dict[str, str] = Field(default_factory=dict, max_length=MOST_SECRETS, repr=False)

    # Our own.
    loss: Loss = "dapo"
    advantage: Advantage = "group_std"
    updates_per_batch: int = Field(default=1, ge=1, le=16)
    clip_low: float | None = Field(default=None, gt=0, lt=1)
    clip_high: float | None = Field(default=None, gt=0)
    dual_clip: float | None = Field(default=None, gt=1)
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: KLEstimator | None = None
    sampler_correction: SamplerCorrectionConfig = Field(default_factory=SamplerCorrectionConfig)
    overlong: Literal["keep", "filter", "punish"] = "keep"
    overlong_buffer: int | None = Field(default=None, ge=1, le=10_000_000)
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
        if isinstance(value, (list, tuple)):
            return {str(key): f"{STORED}{key}" for key in value}
        return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    @field_validator("secrets")
    @classmethod
    def _secrets_are_variables(cls, secrets: dict[str, str]) -> dict[str, str]:
        """Errors name the variable and never its value."""
        for name, value in secrets.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of an environment variable: letters, digits and _ only")
            if _TAKEN.fullmatch(name):
                raise ValueError(f"{name} is set by the sandbox itself; give the secret another name")
            if not value or "\0" in value or len(value.encode(errors="replace")) > LONGEST_SECRET:
                raise ValueError(f"the value of {name} is empty, longer than {LONGEST_SECRET} bytes or has a NUL in it")
        return secrets

    @model_validator(mode="before")
    @classmethod
    def _lora_only(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("adapter", "lora") != "lora":
            raise ValueError(f"GRPOConfig.adapter: {value['adapter']!r} cannot be trained with GRPO; use 'lora'")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for name, other, problem in self._conflicts():
            # Without a base model it continues another run, which may have set the one that is not set here.
            if self.base_model is not None or {name, other} <= self.model_fields_set:
                default = "" if name in self.model_fields_set else " (the default)"
                raise ValueError(f"GRPOConfig.{name}={getattr(self, name)!r}{default} {problem}")
        return self

    def _conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Two fields whose values make no sense together, and what to do about it."""
        batch, group = self.effective_batch_size, self.num_generations
        if batch % group:
            lower, upper = batch // group * group, (batch // group + 1) * group
            fix = "a step takes whole groups. Nearest valid: effective_batch_size=" + f"{lower} or " * bool(lower)
            yield (
                "effective_batch_size",
                "num_generations",
                f"is not a multiple of num_generations={group}: {fix}{upper}",
            )
        loss, longest, highest = self.loss, self.sampling_params.max_tokens, 1 + self.clip_bounds[1]
        for name in ("clip_low", "clip_high"):
            if loss == "sapo" and getattr(self, name) is not None:
                yield name, "loss", "cannot act with loss='sapo', which has a gate instead of a clip: leave it out"
        if self.dual_clip is not None and loss in ("cispo", "sapo"):
            yield "dual_clip", "loss", f"cannot act with loss={loss!r}, which has no clipped surrogate: leave it out"
        elif self.dual_clip is not None and self.dual_clip <= highest:
            yield "dual_clip", "clip_high", f"has to be above 1 + clip_high = {highest:g}; 3 is the published value"
        if self.dual_clip is not None and self.updates_per_batch == 1:
            yield "dual_clip", "updates_per_batch", "bounds a ratio that is 1 with updates_per_batch=1: leave it out"
        if self.kl_in == "reward" and self.beta == 0:
            yield "kl_in", "beta", "cannot act with beta=0: set beta above 0, or kl_in='loss'"
        if self.kl_in == "reward" and self.advantage == "group_std":
            # Where the rewards of a group agree, only the KL would be left, blown up to the size of any other signal.
            yield (
                "kl_in",
                "advantage",
                "would lose beta in the division by a group's spread: set advantage='group_mean'",
            )
        if loss == "gspo" and self.sampler_correction.level == "token":
            yield "loss", "sampler_correction", "has one ratio per completion: set sampler_correction.level='sequence'"
        if self.overlong_buffer is not None and self.overlong != "punish":
            yield "overlong_buffer", "overlong", f"cannot act with overlong={self.overlong!r}: set overlong='punish'"
        if (self.overlong_buffer or 0) > longest:
            yield "overlong_buffer", "sampling_params", f"is more than sampling_params.max_tokens={longest}"

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may act; infinite where there is no bound."""
        low, high = CLIP_BOUNDS[self.loss]
        return (low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high)

    @property
    def kl_estimate(self) -> KLEstimator:
        """The estimator in force: by default k3 in the loss and k1 in the reward."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")

    @property
    def overlong_tokens(self) -> int:
        """The last tokens of `max_tokens` over which the punishment grows: a fifth of them, as in DAPO."""
        return self.overlong_buffer or max(1, self.sampling_params.max_tokens // 5)

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
        """These settings with what `child` sets on top (contract 2.2); a set of reward functions is replaced whole.

        A setting that was chosen for a value which `child` changes is not inherited: bounds of another loss, say.
        """
        inherited, changes = self.to_wire(), child.to_wire()
        left = {"train_steps", "epochs"} if {"train_steps", "epochs"} & changes.keys() else set()
        left |= {"dual_clip"} if changes.get("updates_per_batch") == 1 else set()
        for name in CHOSEN_FOR.keys() & changes.keys():
            left |= CHOSEN_FOR[name] if changes[name] != getattr(self, name) else set()
        inherited = {name: value for name, value in inherited.items() if name not in left}
        for name, value in changes.items():
            whole = name == "rewardFns" or not isinstance(value, dict)
            inherited[name] = value if whole else {**inherited.get(name, {}), **value}
        return GRPOConfig(**inherited)
