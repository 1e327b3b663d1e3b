"""The same batch and the same rewards through TRL's own trainer: same loss, same LoRA gradients.

TRL generates nothing here: its `rollout_func` hands it our completions. The rest of its step is its own, from rewards
to advantages, old and reference log-probs, sampler correction and loss. What it does otherwise is left out: completions
without a reward stay in its denominators, and it adds 1e-4 to standard deviations where we add 1e-6, which totals of
this size make too small to see.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from job_runs import config
from peft import LoraConfig, PeftModel
from tiny_models import WORDS, random_model, tokenizer

from rewardsmith.config import GRPOConfig
from rewardsmith.rewards.outcomes import Score
from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.train.batch import Example, Gradient
from rewardsmith.train.learner import Learner
from rewardsmith.train.lora import POLICY, attach
from rewardsmith.train.plain import PlainPath
from rewardsmith.train.samples import Sample, examples, with_advantages
from rewardsmith.train.update import make_optimizer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are using 'rollout_func':UserWarning", "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)

VOCAB, MAX_TOKENS, GROUP = len(WORDS), 12, 3
PROMPTS = [[5, 6, 7], [9], [12, 3, 3, 8, 20], [4, 4]]
LENGTHS = [[1, 4, 9], [12, 1, 3], [3, 2, 5], [2, 2, 7]]
TOTALS = [[0.0, 1000.0, 250.0], [2000.0, 500.0, -1000.0], [500.0, 500.0, 500.0], [0.0, 0.0, 1000.0]]


Gradients = Callable[[list[Example], GRPOConfig, list[torch.Tensor | None] | None], Gradient]


def plain() -> tuple[PeftModel, Gradients]:
    model = attach(random_model("qwen2", vocab_size=VOCAB).double(), config(), "base")
    make_optimizer(model, config().optimizer, 1e-3)  # which gives every parameter its gradient
    return model, PlainPath(model, VOCAB).gradient


def fast() -> tuple[PeftModel, Gradients]:
    learner = Learner(random_model("qwen2", vocab_size=VOCAB).double(), tokenizer(), config())
    torch.set_num_threads(1)  # it took all cores for its one rank
    assert learner.path.startswith("fast")

    def gradient(examples: list[Example], config: GRPOConfig, old_logps: list[torch.Tensor | None] | None) -> Gradient:
        learner.deliver(version=1)
        return learner.gradients.gradient(examples, config, old_logps)

    return learner.model, gradient


# A model with our adapter, and what adds the gradient of a batch to it.
PATHS: dict[str, Callable[[], tuple[PeftModel, Gradients]]] = {"plain": plain, "fast": fast}


@dataclass
class Case:
    """The same settings in both programs' words; `vllm` are attributes of a trainer whose sampler is vLLM."""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    vllm: dict[str, Any] = field(default_factory=dict)


def in_loss(ours: str, theirs: str, low: float, high: float, **more: Any) -> Case:
    return Case({"loss": ours}, {"loss_type": theirs, "epsilon": low, "epsilon_high": high, **more})


def correction(mode: str, level: str, low: float | None) -> Case:
    theirs = {"vllm_importance_sampling_mode": f"{level}_{mode}", "vllm_importance_sampling_clip_max": 2.0}
    return Case(
        {"loss": "grpo", "sampler_correction": {"mode": mode, "level": level, "low": low}},
        {"loss_type": "grpo", "epsilon_high": 0.2, "vllm_importance_sampling_clip_min": low, **theirs},
        {"use_vllm": True},
    )


CASES = {
    "grpo": in_loss("grpo", "grpo", 0.2, 0.2),
    "bnpo": in_loss("bnpo", "bnpo", 0.2, 0.2),
    "dr_grpo": in_loss("dr_grpo", "dr_grpo", 0.2, 0.2),
    "dapo": in_loss("dapo", "dapo", 0.2, 0.28),
    "gspo": in_loss("gspo", "grpo", 3e-4, 4e-4, importance_sampling_level="sequence"),
    "gspo, wide": Case(
        {"loss": "gspo", "clip_low": 0.03, "clip_high": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "cispo": in_loss("cispo", "cispo", 0.2, 5.0),  # there the bound itself
    "sapo": in_loss("sapo", "sapo", 0.2, 0.2),
    "bounds": Case({"loss": "dapo", "clip_low": 0.1, "clip_high": 0.4}, {"epsilon": 0.1, "epsilon_high": 0.4}),
    "dual clip": Case(
        {"loss": "grpo", "dual_clip": 1.25, "updates_per_batch": 2},
        {"loss_type": "grpo", "epsilon_high": 0.2, "delta": 1.25},
    ),
    "kl": Case({"loss": "dapo", "beta": 0.2}, {"beta": 0.2}),
    "kl, by sequence": Case(
        {"loss": "gspo", "beta": 0.2, "clip_low": 0.03, "clip_high": 0.04},
        {
            **{"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.2},
            **{"epsilon": 0.03, "epsilon_high": 0.04},
        },
    ),
    "kl of cispo": Case({"loss": "cispo", "beta": 0.2}, {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.2}),
    "group mean": Case({"advantage": "group_mean"}, {"scale_rewards": "none"}),
    "batch std": Case({"advantage": "batch_std"}, {"scale_rewards": "batch"}),
    "truncated tokens": correction("truncate", "token", None),
    "truncated sequences": correction("truncate", "sequence", None),
    "masked tokens": correction("mask", "token", 0.5),
    "masked sequences": correction("mask", "sequence", 0.25),
}


def completion_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for row in LENGTHS for length in row]


def job(case: Case) -> GRPOConfig:
    return config(**{"sampling_params": {"temperature": 0.9, "max_tokens": MAX_TOKENS}, **case.ours})


@torch.no_grad()
def move(model: PeftModel, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_tensors(model, adapter).values():
        tensor.copy_(0.5 * tensor + 0.07 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


def our_batch(model: PeftModel, job: GRPOConfig) -> tuple[list[Example], list[list[float]]]:
    """The batch, and the log-probs of a sampler that is about the policy."""
    ids = completion_ids()
    blank = [Example(PROMPTS[i // GROUP], tokens, 0.0, 0.0, [0.0] * len(tokens)) for i, tokens in enumerate(ids)]
    generator = torch.Generator().manual_seed(7)
    sampler = [
        (logps + 0.4 * torch.randn(len(logps), generator=generator)).tolist()
        for logps in PlainPath(model, VOCAB).policy_logps(blank, job)
    ]
    groups = []
    for g, prompt in enumerate(PROMPTS):
        group = []
        for n, total in enumerate(TOTALS[g]):
            completion = Completion(ids[g * GROUP + n], sampler[g * GROUP + n], "stop", "")
            group.append(Sample(Prompt(g, "", prompt, {}), n, completion, {"f": Score("ok", total, 0)}, total))
        groups.append(group)
    return examples(with_advantages(groups, job, MAX_TOKENS), job, MAX_TOKENS), sampler


def their_trainer(case: Case, start: PeftModel, sampler: list[list[float]], folder: Path) -> Any:
    """TRL's trainer around a model with the same weights."""
    settings = LoraConfig(
        r=config().rank, lora_alpha=config().lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    arguments = trl.GRPOConfig(
        **{
            **{"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none"},
            **{"gradient_checkpointing": False, "per_device_train_batch_size": len(sampler)},
            **{"num_generations": GROUP, "max_completion_length": MAX_TOKENS, "temperature": 0.9, "beta": 0.0},
            # A generation serves two updates, so the old log-probs are kept.
            **{"num_iterations": 2, "use_bias_correction_kl": False, "loss_type": "dapo", "epsilon_high": 0.28},
            **case.theirs,
        }
    )
    trainer = trl.GRPOTrainer(
        model=random_model("qwen2", vocab_size=VOCAB).double(),
        peft_config=settings,
        reward_funcs=lambda prompts, completions, **columns: [total for row in TOTALS for total in row],
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * len(sampler)),
        processing_class=tokenizer(),
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": [prompt for prompt in PROMPTS for _ in range(GROUP)],
            "completion_ids": completion_ids(),
            "logprobs": sampler,
        },
    )
    ours, theirs = adapter_tensors(start, POLICY), adapter_tensors(trainer.model, "default")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        tensor.copy_(ours[name])
    for name, value in case.vllm.items():
        setattr(trainer, name, value)
    trainer._last_loaded_step = trainer.state.global_step  # a sampler that runs the present weights
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def gradients(model: PeftModel, adapter: str) -> torch.Tensor:
    """All of them in one row, in the order of their names."""
    named = {
        name.replace(f".{adapter}.", "."): parameter.grad
        for name, parameter in model.named_parameters()
        if f".{adapter}." in name
    }
    return torch.cat([named[name].flatten() for name in sorted(named)])


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """TRL's log-probs are float32, also of a float64 model."""
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_trl(
    case: Case, path: Callable[[], tuple[PeftModel, Gradients]], tmp_path: Path
):
    settings = job(case)
    model, gradient = path()
    move(model, POLICY, seed=2)
    batch, sampler = our_batch(model, settings)
    trainer = their_trainer(case, model, sampler, tmp_path)
    inputs = trainer._generate_and_score_completions([{"prompt": "a"} for _ in sampler])
    assert same(torch.tensor([example.advantage for example in batch]), inputs["advantages"])

    old_logps = None
    for update in ("first", "second"):
        theirs = trainer.compute_loss(trainer.model, inputs)
        trainer.model.zero_grad()
        theirs.backward()
        model.zero_grad(set_to_none=False)
        found = gradient(batch, settings, old_logps)
        expected = gradients(trainer.model, "default")
        assert expected.norm() > 0 or case is CASES["gspo"], update
        assert same(gradients(model, POLICY), expected), update
        # Advantages of about 1 that cancel: a first loss of grpo is 0 but for rounding.
        assert found.loss == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6), update
        old_logps = found.logps
        for moved, adapter in ((model, POLICY), (trainer.model, "default")):
            move(moved, adapter, seed=4)
