"""The base model and its tokenizer, from a Hugging Face id or a folder: safetensors only, no code of the model's own.

Float32 on CPUs, where bfloat16 is many times slower, bfloat16 on CUDA. Weights are frozen; adapters come in `lora`.
"""

from __future__ import annotations

import inspect

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from rewardsmith.errors import ModelError

# What the plain path asks of a model's forward; recurrent models and encoder-decoders lack some of it.
NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")


def load_base(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Raises ModelError with the reason and what to do."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # output goes to a log file
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tokenizer = _tokenizer(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"base model {source!r} cannot be loaded: {_reason(error)}") from error
    missing = [name for name in NEEDED if name not in inspect.signature(model.forward).parameters]
    if missing:
        raise ModelError(
            f"base model {source!r} ({type(model).__name__}) cannot be trained here: its forward has no "
            f"{', '.join(missing)}; decoder-only transformers have"
        )
    model.requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    return model.train(False), tokenizer


def _tokenizer(source: str) -> PreTrainedTokenizerBase:
    """As tokenizer.json says. AutoTokenizer goes by the architecture and rebuilds, say, any Qwen2's in Qwen2's way,
    which gives other ids where a model has a tokenizer of its own; it is left for models without that file.
    """
    if cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False):
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(source)
    else:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return tokenizer


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "safetensors" in text and not isinstance(error, SafetensorError):
        return (
            "it has no weights in safetensors format. Weights in pickle files (pytorch_model.bin) can run code and are "
            f"not loaded; convert them, or use a model that has model.safetensors. ({text.splitlines()[0]})"
        )
    if "trust_remote_code" in text:
        return "it needs code of its own (trust_remote_code), which is not run; use a model that transformers knows"
    return text.splitlines()[0] if text else type(error).__name__
