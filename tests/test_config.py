"""The config classes: accepted forms of reward functions, refusals, defaults of the contract, the way over the wire."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from rewardsmith.config import (
    GRPOConfig,
    OptimizerConfig,
    SamplingParamsConfig,
    SchedulerConfig,
)
from rewardsmith.errors import ConfigError, RewardSourceError
from rewardsmith.home import ServerConfig, default_base_url, default_home
from rewardsmith.reward_config import RewardFunction, RewardFunctionsConfig, RewardFunctionsRuntimeConfig


def short(prompt, completion, example):
    return -len(completion)


def exact(prompt, completion, example):
    return float(completion == example["answer"])


def needs_re(prompt, completion, example):
    return json.loads(completion)


# ---- reward functions in every form ---------------------------------------------------------------------------------

FORMS: dict[str, tuple[Any, list[str]]] = {
    "one function": (short, ["short"]),
    "list": ([short, exact], ["short", "exact"]),
    "tuple": ((exact, short), ["exact", "short"]),
    "dict": ({"a": short, "b": exact}, ["a", "b"]),
    "dict of settings": ({"a": {"encoded_fn": RewardFunction.from_callable(short).encoded_fn, "weight": 2}}, ["a"]),
    "dict of wire settings": ({"a": {"encodedFn": RewardFunction.from_callable(short).encoded_fn}}, ["a"]),
    "dict with functions": ({"functions": {"a": short}}, ["a"]),
    "dict with functions and runtime": ({"functions": [short], "runtime": {"packages": ["sympy"]}}, ["short"]),
    "config of a dict": (RewardFunctionsConfig(functions={"a": short}), ["a"]),
    "config of a list": (RewardFunctionsConfig(functions=[short, exact]), ["short", "exact"]),
    "config of a function": (RewardFunctionsConfig(functions=short), ["short"]),
    "reward function objects": ({"a": RewardFunction.from_callable(exact, weight=0.5)}, ["a"]),
    "a function named functions": ({"functions": {"functions": short}}, ["functions"]),
    "nothing": ({}, []),
}


@pytest.mark.parametrize(("given", "names"), FORMS.values(), ids=FORMS)
def test_accepted_forms(given: Any, names: list[str]) -> None:
    config = GRPOConfig(reward_fns=given)
    assert list(config.reward_fns) == names
    assert len(config.reward_fns) == len(names)
    for name in names:
        assert name in config.reward_fns
        assert config.reward_fns[name].source.startswith("def ")
    assert GRPOConfig(rewardFns=given).reward_fns == config.reward_fns


REFUSED_FORMS: dict[str, tuple[Any, str]] = {
    "a number": (3, "a dict, a list or one function, not a int"),
    "text": ("def f(a, b, c): return 1", "not a str"),
    "a dict of numbers": ({"a": 3}, "'a' is a int; give a function or a RewardFunction"),
    "a name that is no text": ({1: short}, "printable text of 1 to 100 characters, not 1"),
    "an empty name": ({"": short}, "not ''"),
    "a line break in a name": ({"a\nb": short}, "printable"),
    "a long name": ({"a" * 101: short}, "1 to 100"),
    "the name of a metric": ({"total_reward": short}, "'total_reward' is the name of a metric"),
    "two of one name": ([short, short], "two reward functions are named 'short'; give a dict"),
    "a thing without a name": ([3], "a int in a list has no name; give a dict"),
    "objects in a list": ([RewardFunction.from_callable(short)], "a RewardFunction in a list has no name; give a dict"),
    "no base64": ({"a": {"encodedFn": "not base64!"}}, "not base64 of UTF-8"),
    "base64 of bytes": ({"a": {"encodedFn": base64.b64encode(b"\xff\xfe").decode()}}, "not base64 of UTF-8"),
    "an unknown setting": ({"a": {"encodedFn": "", "wieght": 2}}, "RewardFunction has no field 'wieght'; did you mean"),
    "an unknown level": (
        {"functions": {"a": short}, "packages": []},
        "did you mean 'runtime.packages'",
    ),
}


@pytest.mark.parametrize(("given", "says"), REFUSED_FORMS.values(), ids=REFUSED_FORMS)
def test_refused_forms(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        GRPOConfig(reward_fns=given)


def test_functions_that_cannot_travel_are_refused_by_name_with_line_and_fix() -> None:
    with pytest.raises(
        RewardSourceError, match=r"^reward function 'judge': line 2: `json` comes .*write `import json`"
    ):
        GRPOConfig(reward_fns={"judge": needs_re})
    with pytest.raises(RewardSourceError, match=r"'x': line \d+ of its file: a lambda"):
        GRPOConfig(reward_fns={"x": lambda prompt, completion, example: 1})
    with pytest.raises(RewardSourceError, match="line 1: `f\\(a\\)` does not have exactly three parameters"):
        RewardFunction.from_source("def f(a): return 1")


def test_a_refused_function_is_not_printed_in_base64() -> None:
    for given in ([RewardFunction.from_callable(short)], {"a": {"encodedFn": "?" * 200}}):
        with pytest.raises(ConfigError) as refused:
            GRPOConfig(reward_fns=given)
        assert len(refused.value.message) < 200


def test_functions_change_like_a_dict() -> None:
    config = GRPOConfig(reward_fns={"a": short})
    config.reward_fns["b"] = exact
    config.reward_fns["a"] = RewardFunction.from_callable(exact, weight=3)
    assert [(name, config.reward_fns[name].weight) for name in config.reward_fns] == [("a", 3.0), ("b", 1.0)]
    del config.reward_fns["a"]
    assert list(config.reward_fns) == ["b"]
    for broken, error in [(3, ConfigError), (needs_re, RewardSourceError)]:
        with pytest.raises(error):
            config.reward_fns["b"] = broken
    with pytest.raises(KeyError):
        del config.reward_fns["a"]
    with pytest.raises(KeyError):
        config.reward_fns["a"]
    with pytest.raises(ConfigError, match="name of a metric"):
        config.reward_fns["total_reward_std"] = short
    assert config.to_wire()["rewardFns"]["functions"].keys() == {"b"}


def test_a_reward_function_gives_its_source_and_the_function() -> None:
    made = RewardFunction.from_callable(exact)
    assert made.source == 'def exact(prompt, completion, example):\n    return float(completion == example["answer"])\n'
    assert made.function("", "4", {"answer": "4"}) == 1.0


# ---- refusals -------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[type[BaseModel], dict[str, Any], str]] = [
    (GRPOConfig, {"num_train_epochs": 3}, "GRPOConfig has no field 'num_train_epochs'; did you mean 'epochs'?"),
    (GRPOConfig, {"learningrate": 1e-5}, "did you mean 'learning_rate'"),
    (GRPOConfig, {"zzz": 1}, "its fields: adapter, advantage"),
    (GRPOConfig, {"max_tokens": 1}, "did you mean 'sampling_params.max_tokens'"),
    (GRPOConfig, {"top_p": 1}, "did you mean 'sampling_params.top_p'"),
    (GRPOConfig, {"max_token": 1}, "did you mean 'sampling_params.max_tokens'"),
    (GRPOConfig, {"max_completion_length": 1}, "did you mean 'sampling_params.max_tokens'"),
    (GRPOConfig, {"packages": []}, "did you mean 'reward_fns.runtime.packages'"),
    (GRPOConfig, {"weight": 2}, "did you mean 'RewardFunction.weight'"),
    (GRPOConfig, {"lr": 1}, "did you mean 'learning_rate'"),
    (GRPOConfig, {"rollouts_per_prompt": 8}, "did you mean 'num_generations'"),
    (GRPOConfig, {"gradient_accumulation_steps": 8}, "did you mean 'effective_batch_size'"),
    (RewardFunctionsConfig, {"weight": 2}, "did you mean 'RewardFunction.weight'"),
    (
        GRPOConfig,
        {"base_model": "m", "effective_batch_size": 100},
        "100 is not a multiple of num_generations=16.*96 or 112",
    ),
    (
        GRPOConfig,
        {"base_model": "m", "num_generations": 24},
        r"16 \(the default\) is not a multiple.*effective_batch_size=24",
    ),
    (GRPOConfig, {"adapter": "turbo"}, "'turbo' cannot be trained with GRPO; use 'lora'"),
    (GRPOConfig, {"task": "sft"}, "GRPOConfig.task"),
    (GRPOConfig, {"learning_rate": 0}, "GRPOConfig.learning_rate.*greater than 0"),
    (GRPOConfig, {"learning_rate": float("nan")}, "GRPOConfig.learning_rate"),
    (GRPOConfig, {"num_generations": 1}, "GRPOConfig.num_generations"),
    (GRPOConfig, {"beta": 1.5}, "GRPOConfig.beta"),
    (GRPOConfig, {"beta": float("inf")}, "GRPOConfig.beta"),
    (GRPOConfig, {"beta": float("nan")}, "GRPOConfig.beta"),
    (GRPOConfig, {"epochs": 0}, "GRPOConfig.epochs"),
    (GRPOConfig, {"epochs": "many"}, r"GRPOConfig.epochs.*\(given: 'many'\)"),
    (GRPOConfig, {"target_modules": []}, "GRPOConfig.target_modules"),
    (GRPOConfig, {"seed": -1}, "GRPOConfig.seed"),
    (GRPOConfig, {"sampling_params": {"temperature": 0}}, "temperature"),
    (
        GRPOConfig,
        {"sampling_params": {"temp": 1}},
        "SamplingParamsConfig has no field 'temp'; did you mean 'temperature'",
    ),
    (GRPOConfig, {"lr_scheduler": {"type": "cosin"}}, "SchedulerConfig.type"),
    (GRPOConfig, {"optimizer": {"type": "sgd"}}, "OptimizerConfig.type"),
    (SamplingParamsConfig, {"top_p": 0}, "top_p"),
    (SamplingParamsConfig, {"min_p": 1.5}, "SamplingParamsConfig.min_p"),
    (SamplingParamsConfig, {"stop": [""]}, "SamplingParamsConfig.stop.0"),
    (SamplingParamsConfig, {"stop": "END"}, "SamplingParamsConfig.stop"),
    (SamplingParamsConfig, {"stop": ["x"] * 17}, "SamplingParamsConfig.stop.*at most 16"),
    (GRPOConfig, {"num_iterations": 4}, "did you mean 'updates_per_batch'"),
    (GRPOConfig, {"loss_type": "dapo"}, "did you mean 'loss'"),
    (GRPOConfig, {"epsilon_high": 0.3}, "did you mean 'clip_high'"),
    (GRPOConfig, {"delta": 4}, "did you mean 'dual_clip'"),
    (GRPOConfig, {"updates_per_batch": 0}, "GRPOConfig.updates_per_batch"),
    (GRPOConfig, {"updates_per_batch": 17}, "GRPOConfig.updates_per_batch"),
    (GRPOConfig, {"clip_low": 1}, "GRPOConfig.clip_low"),
    (GRPOConfig, {"dual_clip": 1}, "GRPOConfig.dual_clip"),
    (GRPOConfig, {"loss": "ppo"}, "GRPOConfig.loss"),
    (GRPOConfig, {"advantage": "opo"}, "GRPOConfig.advantage"),
    (GRPOConfig, {"sampler_correction": {"high": 0.9}}, "SamplerCorrectionConfig.high"),
    (GRPOConfig, {"sampler_correction": {"low": 1.1}}, "SamplerCorrectionConfig.low"),
    (GRPOConfig, {"sampler_correction": {"clip": 2}}, "SamplerCorrectionConfig has no field 'clip'"),
    (SamplingParamsConfig, {"max_tokens": 0}, "max_tokens"),
    (RewardFunction, {"encoded_fn": "", "weight": float("nan")}, "RewardFunction.weight"),
    (RewardFunction, {"encoded_fn": "", "on_error": "ignore"}, "RewardFunction.on_error"),
    (
        RewardFunctionsConfig,
        {"function": {}},
        "RewardFunctionsConfig has no field 'function'; did you mean 'functions'",
    ),
    (RewardFunctionsRuntimeConfig, {"packages": "sympy"}, "RewardFunctionsRuntimeConfig.packages"),
]


@pytest.mark.parametrize(("config", "fields", "says"), REFUSED, ids=[f"{c.__name__}-{f}" for c, f, _ in REFUSED])
def test_refusals_name_the_field_and_the_fix(config: Callable[..., Any], fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**fields)


CONFLICTS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"loss": "sapo", "clip_low": 0.1}, "clip_low=0.1 cannot act with loss='sapo'", {"loss": "dapo"}),
    ({"loss": "sapo", "clip_high": 0.1}, "clip_high=0.1 cannot act with loss='sapo'", {"loss": "cispo"}),
    ({"loss": "cispo", "dual_clip": 3, "updates_per_batch": 2}, "dual_clip=3.0 cannot act with loss", {"loss": "gspo"}),
    ({"dual_clip": 3, "updates_per_batch": 1}, "dual_clip=3.0 bounds a ratio that is 1", {"updates_per_batch": 2}),
    (
        {"loss": "grpo", "dual_clip": 1.3, "clip_high": 0.3, "updates_per_batch": 2},
        "dual_clip=1.3 has to be above 1 . clip_high = 1.3",
        {"clip_high": 0.2},
    ),
    (
        {"kl_in": "reward", "beta": 0, "advantage": "rloo"},
        "kl_in='reward' cannot act with beta=0: set beta above 0",
        {"beta": 0.01},
    ),
    (
        {"kl_in": "reward", "advantage": "group_std"},
        "kl_in='reward' would lose beta in the division",
        {"advantage": "group_mean"},
    ),
    (
        {"loss": "gspo", "sampler_correction": {"level": "token"}},
        "loss='gspo' has one ratio per completion: set sampler_correction.level='sequence'",
        {"sampler_correction": {"level": "sequence"}},
    ),
    (
        {"overlong": "filter", "overlong_buffer": 8},
        "overlong_buffer=8 cannot act with overlong='filter'",
        {"overlong": "punish"},
    ),
    (
        {"overlong": "punish", "overlong_buffer": 65, "sampling_params": {"max_tokens": 64}},
        "overlong_buffer=65 is more than sampling_params.max_tokens=64",
        {"overlong_buffer": 64},
    ),
]


@pytest.mark.parametrize(("fields", "says", "fix"), CONFLICTS, ids=[str(fields) for fields, _, _ in CONFLICTS])
def test_settings_that_make_no_sense_together_are_refused(
    fields: dict[str, Any], says: str, fix: dict[str, Any]
) -> None:
    for base in ({}, {"base_model": "m"}):
        with pytest.raises(ConfigError, match=f"^GRPOConfig.{says}"):
            GRPOConfig(**base, **fields)
        assert GRPOConfig(**base, **fields | fix).to_wire()
    # Stored with every default filled in, what was accepted still is.
    stored = GRPOConfig(base_model="m", **fields | fix).model_dump(mode="json", by_alias=True)
    assert GRPOConfig(**stored).model_dump() == GRPOConfig(base_model="m", **fields | fix).model_dump()


def test_what_one_field_needs_may_be_inherited() -> None:
    parent = GRPOConfig(base_model="m", updates_per_batch=4, overlong="punish")
    child = parent.continued_by(GRPOConfig(dual_clip=3, overlong_buffer=2000, sampling_params={"max_tokens": 4000}))
    assert (child.dual_clip, child.overlong_buffer, child.updates_per_batch) == (3, 2000, 4)
    with pytest.raises(ConfigError, match="bounds a ratio that is 1 with updates_per_batch=1"):
        GRPOConfig(base_model="m").continued_by(GRPOConfig(dual_clip=3))
    with pytest.raises(ConfigError, match="bounds a ratio that is 1 with updates_per_batch=1"):
        GRPOConfig(base_model="m", dual_clip=3)


def test_settings_of_one_loss_are_not_inherited_by_another() -> None:
    parent = GRPOConfig(
        base_model="m", loss="grpo", clip_low=0.1, clip_high=0.3, dual_clip=3, updates_per_batch=4, overlong="punish",
        overlong_buffer=9,
    )  # fmt: skip
    same = parent.continued_by(GRPOConfig(loss="grpo", learning_rate=1e-4, updates_per_batch=2))
    assert (same.clip_low, same.clip_high, same.dual_clip, same.overlong_buffer) == (0.1, 0.3, 3, 9)
    other = parent.continued_by(GRPOConfig(loss="sapo", overlong="keep"))
    assert (other.clip_low, other.clip_high, other.dual_clip, other.overlong_buffer) == (None, None, None, None)
    assert parent.continued_by(GRPOConfig(loss="dapo", clip_high=0.4)).clip_bounds == (0.2, 0.4)
    assert parent.continued_by(GRPOConfig(updates_per_batch=1)).dual_clip is None


def test_bounds_and_buffer_are_the_published_ones_until_they_are_set() -> None:
    assert GRPOConfig().clip_bounds == (0.2, 0.28)
    assert GRPOConfig(loss="gspo").clip_bounds == (3e-4, 4e-4)
    assert GRPOConfig(loss="gspo", clip_low=0.01).clip_bounds == (0.01, 4e-4)
    assert GRPOConfig(overlong="punish", sampling_params={"max_tokens": 20_480}).overlong_tokens == 4096
    assert GRPOConfig(overlong="punish", overlong_buffer=7).overlong_tokens == 7
    assert GRPOConfig(sampling_params={"max_tokens": 3}).overlong_tokens == 1


def test_a_field_set_later_is_checked_as_well() -> None:
    config = GRPOConfig()
    with pytest.raises((ConfigError, ValueError), match="learning_rate"):
        config.learning_rate = -1.0
    with pytest.raises((ConfigError, ValueError)):
        config.num_train_epochs = 3  # type: ignore[attr-defined]


def test_what_is_meant_exists() -> None:
    for section in (GRPOConfig, RewardFunctionsConfig):
        for meant in section._MEANT.values():
            assert meant == "RewardFunction.weight" or meant in section._paths().values()


# ---- defaults and the wire ------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_contract() -> None:
    config = GRPOConfig()
    assert (config.task, config.adapter, config.learning_rate) == ("grpo", "lora", 1e-5)
    assert (config.rank, config.lora_alpha, config.warmup_ratio) == (64, 64, 0.03)
    assert (config.effective_batch_size, config.num_generations, config.beta) == (16, 16, 0.001)
    assert (config.lr_scheduler.type, config.optimizer.type) == ("linear", "paged_adamw_8bit")
    assert (config.enable_early_stopping, config.apply_chat_template) == (True, False)
    assert config.total_steps(train_rows=10) == 1000


def test_none_means_not_set_and_only_what_was_set_travels() -> None:
    assert GRPOConfig(epochs=None, learning_rate=None, reward_fns=None).to_wire() == {}
    assert GRPOConfig().to_wire() == {}
    wire = GRPOConfig(
        learning_rate=1e-5,
        lora_dropout=0.0,
        sampling_params=SamplingParamsConfig(max_tokens=7),
        reward_fns={"a": short},
        secrets={"KEY": 1},
    ).to_wire()
    assert wire == {
        "learning_rate": 1e-5,
        "lora_dropout": 0.0,
        "sampling_params": {"max_tokens": 7},
        "rewardFns": {"functions": {"a": {"encodedFn": RewardFunction.from_callable(short).encoded_fn}}},
        "secrets": {"KEY": "1"},
    }


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(),
        GRPOConfig(base_model="m", train_steps=5, beta=0, seed=2**63 - 1, target_modules=["q_proj"]),
        GRPOConfig(lr_scheduler=SchedulerConfig(type="cosine"), optimizer=OptimizerConfig(beta1=0.8)),
        GRPOConfig(
            reward_fns=RewardFunctionsConfig(
                functions={
                    "a": RewardFunction.from_callable(short, weight=-1, on_error="fail", none="abstain"),
                    "b": exact,
                },
                runtime=RewardFunctionsRuntimeConfig(packages=["sympy==1.14"]),
            )
        ),
    ],
    ids=["empty", "plain", "sections", "rewards"],
)
def test_round_trip_over_the_wire(config: GRPOConfig) -> None:
    arrived = GRPOConfig(**json.loads(json.dumps(config.to_wire())))
    assert arrived == config
    assert arrived.to_wire() == config.to_wire()
    stored = config.model_dump(mode="json", by_alias=True)
    whole = GRPOConfig(**json.loads(json.dumps(stored)))
    assert whole.model_dump() == config.model_dump()
    assert list(whole.reward_fns) == list(config.reward_fns)


def test_settings_of_scheduler_and_optimizer_in_the_originals_form() -> None:
    config = GRPOConfig(
        lr_scheduler={"type": "cosine_with_restarts", "params": {"num_cycles": 3}},
        optimizer={"type": "adamw_torch", "params": {"weight_decay": 0.1}},
    )
    assert (config.lr_scheduler.num_cycles, config.optimizer.weight_decay) == (3, 0.1)
    with pytest.raises(ConfigError, match="has no field 'cycles'"):
        GRPOConfig(lr_scheduler={"type": "cosine", "params": {"cycles": 3}})


@pytest.mark.parametrize(
    ("fields", "rows", "steps"),
    [
        ({}, 5, 1000),
        ({"train_steps": 7, "epochs": 3}, 5, 7),
        ({"epochs": 2}, 10, 20),
        ({"epochs": 3, "effective_batch_size": 32, "num_generations": 8}, 10, 8),
        ({"epochs": 1, "effective_batch_size": 64, "num_generations": 8}, 2, 1),
    ],
)
def test_total_steps(fields: dict[str, Any], rows: int, steps: int) -> None:
    assert GRPOConfig(**fields).total_steps(rows) == steps


def test_a_run_that_goes_on_keeps_what_the_new_config_does_not_set() -> None:
    first = GRPOConfig(base_model="m", train_steps=5, learning_rate=1e-4, reward_fns=[short], beta=0.0)
    second = first.continued_by(GRPOConfig(epochs=3, learning_rate=1e-5))
    assert (second.base_model, second.train_steps, second.epochs, second.beta) == ("m", None, 3, 0.0)
    assert (second.learning_rate, list(second.reward_fns)) == (1e-5, ["short"])
    assert first.continued_by(GRPOConfig()).to_wire() == first.to_wire()
    assert list(first.continued_by(GRPOConfig(reward_fns=[exact])).reward_fns) == ["exact"]


# ---- the surroundings of a server -----------------------------------------------------------------------------------


def test_where_things_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("REWARDSMITH_BASE_URL", "PREDIBASE_GATEWAY", "REWARDSMITH_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_base_url() == "http://127.0.0.1:8421"
    monkeypatch.setenv("PREDIBASE_GATEWAY", "http://theirs:1/v1/")
    assert default_base_url() == "http://theirs:1"
    monkeypatch.setenv("REWARDSMITH_BASE_URL", "http://ours:2/")
    assert default_base_url() == "http://ours:2"
    assert default_home() == Path("~/.rewardsmith").expanduser()
    monkeypatch.setenv("REWARDSMITH_HOME", str(tmp_path / "home"))
    assert default_home() == tmp_path / "home"
    server = ServerConfig(home=tmp_path)
    assert server.database_url == f"sqlite:///{tmp_path}/rewardsmith.sqlite"
    assert server.artifacts_url == f"file://{tmp_path}/artifacts"
    assert server.token_file.parent == tmp_path


def test_a_refused_assignment_changes_nothing() -> None:
    config = GRPOConfig(num_generations=8)
    for name, value in (("learning_rate", -1), ("effective_batch_size", 100), ("learning_rte", 1e-4)):
        before = config.to_wire()
        with pytest.raises(ConfigError, match=name):
            setattr(config, name, value)
        assert config.to_wire() == before
        assert config.effective_batch_size == 16


def test_a_continuation_leaves_whole_groups_to_what_it_inherits() -> None:
    parent = GRPOConfig(base_model="m", effective_batch_size=48, num_generations=16)
    assert parent.continued_by(GRPOConfig(num_generations=24)).prompts_per_step == 2
    with pytest.raises(ConfigError, match="48 is not a multiple of num_generations=32"):
        parent.continued_by(GRPOConfig(num_generations=32))


def test_a_continuation_keeps_what_it_does_not_set_inside_a_section() -> None:
    parent = GRPOConfig(
        base_model="m",
        sampling_params={"max_tokens": 96, "top_k": 5},
        optimizer={"type": "adamw_torch", "weight_decay": 0.1},
        reward_fns={"a": short, "b": exact},
        train_steps=7,
    )
    child = parent.continued_by(
        GRPOConfig(sampling_params={"temperature": 0.7}, optimizer={"beta2": 0.95}, reward_fns={"c": short}, epochs=2)
    )
    sampling, optimizer = child.sampling_params, child.optimizer
    assert (sampling.max_tokens, sampling.top_k, sampling.temperature) == (96, 5, 0.7)
    assert (optimizer.type, optimizer.weight_decay, optimizer.beta2) == ("adamw_torch", 0.1, 0.95)
    assert list(child.reward_fns) == ["c"]
    assert (child.train_steps, child.epochs) == (None, 2)
