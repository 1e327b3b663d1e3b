"""Tiny random models and a tokenizer for tests: two layers, a vocabulary padded beyond the tokenizer's."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

# Models this small gain nothing from a second thread, and on a busy machine lose much by it.
torch.set_num_threads(1)

WORDS = ["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz", " "]
PADDED_VOCAB = 40
CONTEXT = 64
FAMILIES = ("qwen2", "llama")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter; `<end>` ends a turn."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def random_model(family: str, seed: int = 0) -> Qwen2ForCausalLM | LlamaForCausalLM:
    sizes = {
        "vocab_size": PADDED_VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,  # so that the distributions are far from uniform
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **sizes)).eval()


def save_model(folder: Path, family: str = "qwen2", seed: int = 0) -> Path:
    random_model(family, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
