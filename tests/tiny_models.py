"""Tiny random models and a tokenizer for tests: two layers, a vocabulary padded beyond the tokenizer's."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Models this small gain nothing from a second thread, and on a busy machine lose much by it.
torch.set_num_threads(1)

WORDS = ["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz", " "]
PADDED_VOCAB = 40
CONTEXT = 64
FAMILIES = ("qwen2", "llama")
WINDOW = 6  # of layers that see a window only: shorter than the sequences of most tests

# What each family has that the others lack; numbers small enough for windows, caps and partial rotation to matter.
ODDITIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 12},
    "mistral": {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": WINDOW},
    "gemma2": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5,
    },
    "gemma3": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
        },
    },
    "phi3": {
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}
ALL_FAMILIES = tuple(ODDITIES)
CLASSES = {"gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}  # the others are named after the family


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter; `<end>` ends a turn."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def random_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """`changes` are fields of the family's config, over what is set here."""
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
    name = family.capitalize()
    config_class, model_class = CLASSES.get(family, (f"{name}Config", f"{name}ForCausalLM"))
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**(sizes | ODDITIES[family] | changes))
    model: PreTrainedModel = getattr(transformers, model_class)(config).eval()
    if family not in FAMILIES:
        perturb(model, seed)
    return model


@torch.no_grad()
def perturb(model: PreTrainedModel, seed: int = 0) -> None:
    """Random norms and biases too, which models begin with as all ones or all zeros: both would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def save_model(folder: Path, family: str = "qwen2", seed: int = 0) -> Path:
    random_model(family, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
