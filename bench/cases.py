"""What is measured: model shapes, prompts, lengths and rewards, made here from seeds without network or files.

Both sides build the same case from the same numbers: a Qwen2 with random weights, a tokenizer whose words are
"t2 t3 ...", prompts of random words, a reward that is a function of a completion's ids. Speed does not depend on what
the weights say, only on shapes and lengths, so lengths are made a property of the model (`set_end_probability`):
neither program is hooked or told when to stop.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, END = 0, 1
ROWS = 512  # prompts of a case; a run goes through them in order, then again
NEVER = 1e-12  # probability of the end token where every completion runs to its limit


@dataclass(frozen=True)
class Case:
    """Shapes in numbers, lengths in tokens. A step is `prompts` x `group` completions.

    `mean_tokens` None: every completion has `new_tokens` tokens. Else the end token comes with probability
    1 / `mean_tokens` at each token, so lengths are geometric and cut at `new_tokens`.
    `reward`: "spread" gives every group some signal and is soon computed; "narrow" is the share of a completion's ids
    in the first sixteenth of the vocabulary, which a random model learns to raise.
    """

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    new_tokens: int
    prompt_tokens: tuple[int, int] = (60, 100)
    mean_tokens: float | None = None
    prompts: int = 8
    group: int = 8
    tied: bool = True
    init: float = 0.05
    reward: str = "spread"
    learning_rate: float = 1e-5
    device: str = "cpu"
    rank: int = 16
    lora_alpha: int = 32
    seed: int = 0  # of the adapter and of sampling; the base model is always the same

    @property
    def completions(self) -> int:
        return self.prompts * self.group

    @property
    def context(self) -> int:
        return max(1024, self.prompt_tokens[1] + self.new_tokens)

    @classmethod
    def of(cls, fields: dict) -> Case:
        return cls(**fields | {"prompt_tokens": tuple(fields["prompt_tokens"])})


TINY = Case("tiny", layers=4, hidden=192, mlp=512, heads=6, kv_heads=2, vocab=512, new_tokens=128)
SMALL = Case("small", layers=10, hidden=512, mlp=1536, heads=8, kv_heads=4, vocab=8192, new_tokens=64, init=0.03)
RAGGED = replace(TINY, name="ragged", mean_tokens=40)
LONG = replace(TINY, name="long", prompt_tokens=(512, 512))
RAGGED_LONG = replace(TINY, name="ragged, long", prompt_tokens=(512, 512), mean_tokens=40)
SMALL_RAGGED_LONG = replace(SMALL, name="small, ragged, long", prompt_tokens=(512, 512), new_tokens=128, mean_tokens=40)
CPU_CASES = [TINY, RAGGED, LONG, RAGGED_LONG, SMALL]

# Shapes of Qwen2.5 0.5B and 7B. No weights are needed to measure speed.
QWEN_05B = Case(
    "qwen2.5-0.5b",
    layers=24,
    hidden=896,
    mlp=4864,
    heads=14,
    kv_heads=2,
    vocab=151_936,
    new_tokens=512,
    prompt_tokens=(200, 300),
    prompts=16,
    init=0.02,
    device="cuda",
)
QWEN_7B = replace(
    QWEN_05B, name="qwen2.5-7b", layers=28, hidden=3584, mlp=18_944, heads=28, kv_heads=4, vocab=152_064, tied=False
)
GPU_CASES = [QWEN_05B, replace(QWEN_05B, name="qwen2.5-0.5b, ragged", mean_tokens=160), QWEN_7B]
# The last of them only by name: a step of TRL's takes minutes on two cores.
CASES = {case.name: case for case in [*CPU_CASES, *GPU_CASES, SMALL_RAGGED_LONG]}


def make_tokenizer(case: Case) -> PreTrainedTokenizerFast:
    """One word per id, so that the ids of a prompt survive being decoded and encoded again."""
    words = ["<pad>", "<end>", *(f"t{i}" for i in range(2, case.vocab))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_prompts(case: Case) -> list[list[int]]:
    rng = random.Random(f"prompts {case.prompt_tokens} {case.vocab}")
    shortest, longest = case.prompt_tokens
    return [[rng.randrange(2, case.vocab) for _ in range(rng.randint(shortest, longest))] for _ in range(ROWS)]


def as_text(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def reward(case: Case, ids: list[int]) -> float:
    if case.reward == "narrow":
        return sum(2 <= i < case.vocab // 16 for i in ids) / len(ids)
    return sum(ids) % 101 / 100


def make_model(case: Case) -> Qwen2ForCausalLM:
    """Random weights by a fixed seed: float32 on the CPU, bfloat16 on CUDA."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=case.mlp,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=case.context,
        tie_word_embeddings=case.tied,
        initializer_range=case.init,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device(case.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if case.device == "cuda" else torch.float32)
        try:
            model = Qwen2ForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD, bos_token_id=None)
    set_end_probability(model, case)
    return model


@torch.no_grad()
def set_end_probability(model: Qwen2ForCausalLM, case: Case) -> None:
    """Makes the end token come with the wanted probability after any text, by the weights alone.

    Channel 0 of the residual stream holds 1 for every token and no layer writes to it; the end token's row of the head
    reads that channel only. Its weight is solved for on prompts followed by random tokens. The final norm divides by
    the size of each position's hidden state, so the probability is constant but for a spread of some percent.
    """
    embedding_VH, head_VH = model.get_input_embeddings().weight, model.lm_head.weight
    embedding_VH[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    head_VH[:, 0] = 1.0
    head_VH[END] = 0.0
    rng = random.Random(f"ends {case.vocab}")
    hidden_NH, others_N = [], []
    for prompt in make_prompts(case)[:4]:
        ids = prompt + [rng.randrange(2, case.vocab) for _ in range(min(case.new_tokens, 64))]
        hidden_TH = model.model(torch.tensor([ids], device=embedding_VH.device)).last_hidden_state[0, len(prompt) :]
        hidden_NH.append(hidden_TH[:, 0].double())
        logits_TV = (hidden_TH @ head_VH.T).double()
        logits_TV[:, END] = -torch.inf
        others_N.append(logits_TV.logsumexp(-1))
    constant_N, others_N = torch.cat(hidden_NH), torch.cat(others_N)
    wanted = 1 / case.mean_tokens if case.mean_tokens else NEVER
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if float((constant_N * middle - others_N).sigmoid().mean()) < wanted:
            low = middle
        else:
            high = middle
    head_VH[END, 0] = middle
