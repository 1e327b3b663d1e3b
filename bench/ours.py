"""Our side, in a process of its own: `rewardsmith.train.learner.Learner`, stepped by commands on standard input.

The same commands and answers as `theirs`. It does what `train/loop.py` does in a step, without server, files and reward
processes: generate, score each group as it comes, advantages, update, deliver. Started by `workers.Worker`.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from cases import Case, as_text, make_model, make_prompts, make_tokenizer, reward
from workers import Commands, cuda_peak

from rewardsmith.config import GRPOConfig, OptimizerConfig, SamplingParamsConfig, SchedulerConfig
from rewardsmith.rollout.engine import Completion
from rewardsmith.rollout.prompts import Prompt
from rewardsmith.rollout.sampling import completion_seed
from rewardsmith.train.learner import Learner
from rewardsmith.train.parallel.ranks import Ranks
from rewardsmith.train.samples import Sample, examples, with_advantages

FOREVER = 10**6
PROBES = 8  # completions whose log-probs transformers computes again


def settings(case: Case) -> GRPOConfig:
    """What `theirs` sets, by our names."""
    return GRPOConfig(
        base_model=case.name,
        train_steps=FOREVER,
        learning_rate=case.learning_rate,
        lr_scheduler=SchedulerConfig(type="constant"),
        optimizer=OptimizerConfig(type="adamw_torch_fused"),
        rank=case.rank,
        lora_alpha=case.lora_alpha,
        beta=0.0,
        loss="dapo",
        advantage="group_std",
        max_grad_norm=1.0,
        seed=case.seed,
        effective_batch_size=case.completions,
        num_generations=case.group,
        sampling_params=SamplingParamsConfig(temperature=1.0, max_tokens=case.new_tokens),
    )


class Steps:
    """A learner and where it stands: `taken` optimizer steps."""

    def __init__(self, case: Case, learner: Learner, config: GRPOConfig) -> None:
        self.case = case
        self.learner = learner
        self.config = config
        self.prompts = [Prompt(row, as_text(ids), ids, {}) for row, ids in enumerate(make_prompts(case))]
        self.taken = 0
        self.drawn: dict[int, list[Completion]] = {}  # of the last `generate`, by row

    def next_prompts(self) -> list[Prompt]:
        first = self.taken * self.case.prompts
        return [self.prompts[(first + i) % len(self.prompts)] for i in range(self.case.prompts)]

    def draw(self) -> list[list[Sample]]:
        """One step's groups in the order of the prompts, each scored as soon as it is finished."""
        prompts = self.next_prompts()
        seeds = [completion_seed(self.case.seed, self.taken, p.row, n) for p in prompts for n in range(self.case.group)]
        groups: dict[int, list[Sample]] = {}
        finished = self.learner.engine.generate(
            [prompt.ids for prompt in prompts], self.case.group, self.config.sampling_params, seeds
        )
        for index, completions in finished:
            groups[index] = self.samples(prompts[index], completions)
        return [groups[index] for index in range(len(prompts))]

    def samples(self, prompt: Prompt, completions: list[Completion]) -> list[Sample]:
        return [
            Sample(prompt, number, completion, {}, reward(self.case, completion.ids))
            for number, completion in enumerate(completions)
        ]

    def learn(self, groups: list[list[Sample]]) -> dict[str, float]:
        """Update and delivery; their seconds."""
        started = time.perf_counter()
        batch = examples(with_advantages(groups, self.config, self.case.new_tokens), self.config, self.case.new_tokens)
        self.learner.update(batch, self.taken + 1, FOREVER)
        self.synchronise()
        updated = time.perf_counter()
        self.taken += 1
        self.learner.deliver(self.taken)
        self.synchronise()
        return {"update": updated - started, "deliver": time.perf_counter() - updated}

    def synchronise(self) -> None:
        if self.case.device == "cuda":
            torch.cuda.synchronize()

    def generate(self) -> dict[str, Any]:
        self.synchronise()
        started = time.perf_counter()
        groups = self.draw()
        self.synchronise()
        seconds = time.perf_counter() - started
        self.drawn = {group[0].prompt.row: [sample.completion for sample in group] for group in groups}
        completions = {row: [completion.ids for completion in group] for row, group in self.drawn.items()}
        return {"seconds": seconds, "tokens": tokens(groups), "completions": completions}

    def update(self) -> dict[str, Any]:
        """Learns from what the last `generate` drew; its seconds are those of the update and the delivery."""
        groups = [self.samples(prompt, self.drawn[prompt.row]) for prompt in self.next_prompts()]
        spent = self.learn(groups)
        return {"seconds": sum(spent.values()), "tokens": tokens(groups), **spent}

    def step(self) -> dict[str, Any]:
        self.synchronise()
        started = time.perf_counter()
        groups = self.draw()
        self.synchronise()
        generated = time.perf_counter() - started
        spent = self.learn(groups)
        rewards = [sample.total for group in groups for sample in group if sample.total is not None]
        return {
            "seconds": time.perf_counter() - started,
            "generate": generated,
            "tokens": tokens(groups),
            "reward": sum(rewards) / len(rewards),
            **spent,
        }

    @torch.no_grad()
    def mismatch(self, model: torch.nn.Module) -> dict[str, float]:
        """How far the engine's log-probs are from transformers' for the same tokens, in nats per token.

        Before the first update: the adapter still adds nothing, so the bare model is the policy.
        """
        assert self.taken == 0, "later the bare model is not the policy any more"
        samples = [sample for group in self.draw() for sample in group][:: self.case.completions // PROBES]
        differences = []
        for sample in samples:
            ids, first = sample.prompt.ids + sample.completion.ids, len(sample.prompt.ids)
            logits_TV = model(torch.tensor([ids[:-1]], device=self.case.device)).logits[0, first - 1 :].float()
            targets_T = torch.tensor(sample.completion.ids, device=self.case.device)
            logps_T = logits_TV.log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
            differences.append((logps_T.cpu() - torch.tensor(sample.completion.logps)).abs())
        all_N = torch.cat(differences)
        return {"mean": float(all_N.mean()), "max": float(all_N.max())}


def tokens(groups: list[list[Sample]]) -> int:
    return sum(len(sample.completion.ids) for group in groups for sample in group)


def main() -> None:
    commands = Commands()
    load = commands.next()
    case, workers = Case.of(load["case"]), load["workers"]
    # As a job does: ranks start before the process has a model and threads.
    with Ranks.of_this_machine() if workers is None else Ranks(workers) as ranks:
        model = make_model(case)
        commands.answer({"cuda_peak": cuda_peak()})
        if commands.next() is not None:  # "open"
            obey(commands, case, model, ranks)


def obey(commands: Commands, case: Case, model: torch.nn.Module, ranks: Ranks) -> None:
    """Answers commands until the end of the input."""
    config = settings(case)
    steps = Steps(case, Learner(model, make_tokenizer(case), config, ranks=ranks), config)
    steps.learner.deliver(0)
    commands.answer({"path": steps.learner.path, "cuda_peak": cuda_peak()})
    actions = {
        "generate": steps.generate,
        "update": steps.update,
        "step": steps.step,
        "mismatch": lambda: steps.mismatch(model),
    }
    while (command := commands.next()) is not None:
        commands.answer(actions[command["do"]]() | {"cuda_peak": cuda_peak()})


if __name__ == "__main__":
    main()
