"""Builds the embedded base model `countdown-tiny`: a tokenizer by hand, a small Llama, and its warm start.

    python scripts/build_demo_model.py [folder]        # default: src/rewardsmith/demo/model

One process, one thread, fixed seeds: the same machine and library versions give the same weights. The warm start
teaches the form of an answer and arithmetic, and to search badly: it tries joins in random order and mostly gives up
after a miss. That leaves GRPO something to find. Problems come from the warm_start part of
`rewardsmith.demo.countdown` only. The model card in the folder is written by hand and left alone.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rewardsmith.demo import countdown

SEED = 11
FOLDER = Path(__file__).parents[1] / "src/rewardsmith/demo/model"

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Long fixed phrases are one token each, which keeps prompts near 20 tokens. Longest match wins; the rest is bytes.
PROMPT_PHRASES = [
    "system\n",
    "user\n",
    "assistant\n",
    "You are a helpful assistant. You first think about the reasoning process step by step\n"
    "and then provide the user with an answer.",
    "Using the numbers [",
    "], create an equation that equals ",
    ". You can use\nbasic arithmetic operations (+, -, *, /) and parentheses, and each number can only\n"
    "be used once. Show your work in <think> </think> tags. And return the final equation\n"
    "and answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.",
    "Let me solve this step by step.\n",
]
ANSWER_PHRASES = [
    "<think>\n", ", ", " + ", " - ", " * ", " / ", " = ", ": no\n", ": yes\n", "</think>\n<answer> ", " </answer>",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens, then the special tokens, the phrases and the numbers 10 to 199 (digits are bytes)."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (PAD, START, END)])
    numbers = [str(number) for number in range(10, countdown.LARGEST_VALUE + 1)]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in PROMPT_PHRASES + ANSWER_PHRASES + numbers])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )


PERIODS = (2, 3, 4, 5, 7, 10, 20, 50, 100, 200, 400)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    # Llama, not Qwen2: beside a Qwen2 config transformers always loads its own tokenizer class, which rewrites
    # text to NFC, so that not every string would round-trip.
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.06,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    # Numbers start as points on circles of several periods, and their size: sums are then rotations, which a
    # small model learns in minutes. From random embeddings the same arithmetic takes several times as long.
    for number in range(countdown.LARGEST_VALUE + 1):
        (token,) = tokenizer.encode(str(number))
        angles = [2 * math.pi * number / period for period in PERIODS]
        sizes = [number / 100 - 1, math.log(number + 1) / 2.5 - 1]
        features = torch.tensor([*map(math.cos, angles), *map(math.sin, angles), *sizes])
        with torch.no_grad():
            model.get_input_embeddings().weight[token, : len(features)] = 0.3 * features
    return model


@dataclass(frozen=True)
class Phase:
    """A stretch of the warm start. `persist` and `guess` are probabilities per attempt, the shares are of problems."""

    steps: int
    persist: float  # goes on after a miss
    guess: float  # picks the attempt that reaches the target, instead of a random one
    rate_at_end: float  # learning rates fall in a straight line to this part of their start
    wide: float = 0.15  # share with 3 or 4 numbers up to 99
    three: float = 0.55  # share of the others that has 3 numbers


PHASES = (
    # Much arithmetic: long searches.
    Phase(steps=1200, persist=0.95, guess=0.2, rate_at_end=0.3),
    # The habits GRPO starts from: short searches.
    Phase(steps=400, persist=0.3, guess=0.2, rate_at_end=0.02),
)
BATCH = 48
LONGEST_ANSWER = 6  # attempts


def problem(rng: random.Random, phase: Phase) -> tuple[tuple[int, ...], int]:
    if rng.random() < phase.wide:
        while True:
            nums = tuple(sorted(rng.randint(1, 99) for _ in range(rng.choice((3, 3, 3, 4)))))
            target = rng.choice(countdown.attempts(nums)).value if countdown.attempts(nums) else 0
            if 1 <= target <= 100 and countdown.split_of(nums, target) == "warm_start":
                return nums, target
    return rng.choice(countdown.problems("warm_start", 3 if rng.random() < phase.three else 2))


def answer(nums: tuple[int, ...], target: int, rng: random.Random, phase: Phase) -> str:
    """A search through attempts in random order, each tried once, that ends on a hit or by giving up."""
    untried = list(countdown.attempts(nums))
    rng.shuffle(untried)
    (solution,) = (attempt for attempt in untried if attempt.value == target)
    lines = []
    while True:
        attempt = solution if rng.random() < phase.guess else untried[-1]
        untried.remove(attempt)
        lines.append(f"{', '.join(attempt.steps)}: {'yes' if attempt.value == target else 'no'}\n")
        gives_up = len(lines) == LONGEST_ANSWER or rng.random() > phase.persist
        if attempt.value == target or gives_up:
            break
    return f"<think>\n{''.join(lines)}</think>\n<answer> {attempt.expression} </answer>{END}"


def prompt(nums: tuple[int, ...], target: int, rng: random.Random) -> str:
    """The documented form; one time in ten without the opening of the answer, or without the system message."""
    text = countdown.prompt(rng.sample(nums, len(nums)), target)
    opening, system = "Let me solve this step by step.\n", text.index(f"{START}user")
    if rng.random() < 0.1:
        text = text.removesuffix(opening)
    return text[system:] if rng.random() < 0.1 else text


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random, phase: Phase) -> Iterator[tuple]:
    """(ids_BT, targets_BT) without end; targets are -100 on prompts and padding. Neighbours in length share a batch."""
    while True:
        examples = []
        for _ in range(BATCH * 8):
            nums, target = problem(rng, phase)
            examples.append((prompt(nums, target, rng), answer(nums, target, rng, phase)))
        asked = tokenizer([question for question, _ in examples])["input_ids"]
        answered = tokenizer([reply for _, reply in examples])["input_ids"]
        pool = sorted(zip(asked, answered, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
        starts = list(range(0, len(pool), BATCH))
        rng.shuffle(starts)
        for start in starts:
            rows = pool[start : start + BATCH]
            length = max(len(question) + len(reply) for question, reply in rows)
            ids_BT = torch.full((BATCH, length), tokenizer.pad_token_id)
            targets_BT = torch.full((BATCH, length), -100)
            for i, (question, reply) in enumerate(rows):
                end = len(question) + len(reply)
                ids_BT[i, :end] = torch.tensor(question + reply)
                targets_BT[i, len(question) : end] = torch.tensor(reply)
            yield ids_BT, targets_BT


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(SEED)
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.dim() == 1 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
    ]
    starts = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    model.train()
    started, done, tokens, smooth, scale = time.perf_counter(), 0, 0, 0.0, 1.0
    for phase in PHASES:
        top = scale
        for step, (ids_BT, targets_BT) in zip(range(phase.steps), batches(tokenizer, rng, phase), strict=False):
            scale = top + (phase.rate_at_end - top) * step / phase.steps
            for optimizer, start in zip(optimizers, starts, strict=True):
                optimizer.param_groups[0]["lr"] = start * scale * min(1.0, (done + 1) / 30)
            hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
            wanted_BT = targets_BT[:, 1:] != -100
            logits_NV = model.lm_head(hidden_BTD[wanted_BT])
            loss = torch.nn.functional.cross_entropy(logits_NV, targets_BT[:, 1:][wanted_BT])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            done += 1
            tokens += ids_BT.numel()
            smooth += (loss.item() - smooth) * max(0.05, 1 / done)
            if done % 50 == 0:
                seconds = time.perf_counter() - started
                print(f"step {done}  loss {smooth:.4f}  tokens {tokens}  {seconds:.0f} s", flush=True)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        top_k=0,  # all of the distribution; transformers takes the best 50 otherwise
        max_new_tokens=96,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The name that every version of transformers and vLLM knows for a tokenizer that is all in tokenizer.json.
    named = folder / "tokenizer_config.json"
    named.write_text(named.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
