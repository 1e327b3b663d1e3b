"""TRL's side, in a process of its own: its GRPOTrainer, unchanged, stepped by commands on standard input.

`GRPOTrainer.train` runs as it would for a user; a callback waits before each step for the next command. The phases are
timed around TRL's own methods. Started by `workers.Worker`; with several ranks, one process each, as `torchrun` would
start them. The settings tried are listed in `sides`.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from typing import Any

import torch
import transformers
from cases import END, Case, as_text, make_model, make_prompts, make_tokenizer, reward
from datasets import Dataset
from peft import LoraConfig
from sides import Setting
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workers import Commands, cuda_peak

FOREVER = 10**6


class Steps(TrainerCallback):
    """Obeys commands between optimizer steps and answers each with its seconds, tokens and reward."""

    def __init__(self, case: Case, path: str, commands: Commands) -> None:
        self.case = case
        self.path = path
        self.commands = commands
        self.opened = False
        self.trainer: GRPOTrainer | None = None
        self.prompts = make_prompts(case)
        self.row_of = {tuple(ids): row for row, ids in enumerate(self.prompts)}
        self.forced: dict[int, list[list[int]]] | None = None  # completions of an `update`, by row
        self.rewards: list[float] = []
        self.tokens = 0
        self.started = 0.0
        self.seconds: dict[str, float] = {}

    def on_step_begin(self, args, state, control, **_):
        if not self.opened:  # the answer to "open"
            self.commands.answer({"path": self.path, "cuda_peak": cuda_peak()})
            self.opened = True
        while (command := self.commands.next()) and command["do"] == "generate":
            self.commands.answer(self.generate(state.global_step))
        if command is None:
            raise SystemExit
        completions = command.get("completions")
        self.forced = {int(row): list(group) for row, group in completions.items()} if completions else None
        self.rewards, self.tokens, self.seconds = [], 0, {"generate": 0.0, "score": 0.0}
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.synchronise()
        seconds = time.perf_counter() - self.started
        update = seconds - self.seconds["generate"] - self.seconds["score"]
        self.commands.answer(
            {
                "seconds": seconds,
                "generate": self.seconds["generate"],
                "update": update,
                "tokens": self.tokens,
                "reward": sum(self.rewards) / len(self.rewards),
                "cuda_peak": cuda_peak(),
            }
        )

    def synchronise(self) -> None:
        if self.case.device == "cuda":
            torch.cuda.synchronize()

    def step_prompts(self, step: int) -> list[tuple[int, list[int]]]:
        rows = [(step * self.case.prompts + i) % len(self.prompts) for i in range(self.case.prompts)]
        return [(row, self.prompts[row]) for row in rows]

    def generate(self, step: int) -> dict[str, Any]:
        """The generation of one step alone, by the method that a step calls."""
        ranks, rank = self.trainer.accelerator.num_processes, self.trainer.accelerator.process_index
        mine = self.step_prompts(step)
        mine = mine[len(mine) * rank // ranks : len(mine) * (rank + 1) // ranks]
        asked = [ids for _, ids in mine for _ in range(self.case.group)]
        self.synchronise()
        started = time.perf_counter()
        drawn, _ = self.draw(asked, None, {}, self.case.group)
        self.synchronise()
        seconds = time.perf_counter() - started
        groups = {row: drawn[i * self.case.group : (i + 1) * self.case.group] for i, (row, _) in enumerate(mine)}
        return {"seconds": seconds, "tokens": sum(map(len, drawn)), "completions": groups, "cuda_peak": cuda_peak()}

    def score(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards = [reward(self.case, ids) for ids in completion_ids]
        self.rewards += rewards
        self.tokens += sum(map(len, completion_ids))
        return rewards

    def watch(self, trainer: GRPOTrainer) -> None:
        """Times TRL's generation and all else it does before the update; puts in the completions of an `update`."""
        self.trainer = trainer
        draw, prepare = trainer._generate_single_turn, trainer._generate_and_score_completions
        self.draw = draw

        def timed_draw(prompt_ids, images, multimodal_fields, num_generations, **options):
            if self.forced is not None:
                return [self.forced[self.row_of[tuple(ids)]].pop() for ids in prompt_ids], None
            started = time.perf_counter()
            result = draw(prompt_ids, images, multimodal_fields, num_generations, **options)
            self.synchronise()
            self.seconds["generate"] += time.perf_counter() - started
            return result

        def timed_prepare(inputs):
            before, started = self.seconds["generate"], time.perf_counter()
            result = prepare(inputs)
            self.synchronise()
            spent = time.perf_counter() - started
            self.seconds["score"] += spent - (self.seconds["generate"] - before)
            return result

        trainer._generate_single_turn = timed_draw
        trainer._generate_and_score_completions = timed_prepare


def train(case: Case, setting: Setting, model: transformers.PreTrainedModel | str, steps: Steps, folder: str) -> None:
    cuda = case.device == "cuda"
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=case.completions // (setting.micro_batch * setting.ranks),
        num_generations=case.group,
        max_completion_length=case.new_tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        seed=case.seed,
        max_steps=FOREVER,
        shuffle_dataset=False,
        bf16=cuda or setting.bf16,
        use_cpu=not cuda,
        gradient_checkpointing=setting.checkpointing,
        use_vllm=setting.vllm,
        ddp_backend="gloo" if setting.ranks > 1 and not cuda else None,
        model_init_kwargs={"dtype": "bfloat16"} if setting.vllm else None,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=steps.score,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [as_text(ids) for ids in steps.prompts]}),
        processing_class=make_tokenizer(case),
        peft_config=LoraConfig(
            r=case.rank, lora_alpha=case.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[steps],
    )
    assert trainer.eos_token_ids == [END]
    steps.watch(trainer)
    trainer.train()


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    commands = Commands()
    load = commands.next()
    case, setting = Case.of(load["case"]), Setting(**load["setting"])
    if case.device == "cpu":
        torch.set_num_threads(setting.threads)
    model = make_model(case)
    commands.answer({"cuda_peak": cuda_peak()})
    if commands.next() is None:  # "open"
        return
    steps = Steps(case, f"TRL, {setting.words}", commands)
    with tempfile.TemporaryDirectory() as folder:
        if setting.vllm:  # it loads the model by itself, from files
            model.save_pretrained(folder)
            make_tokenizer(case).save_pretrained(folder)
            model = folder
        train(case, setting, model, steps, folder)


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    main()
