"""Base models by alias: which Hugging Face id or local folder each name stands for, and its context in tokens.

The rule of the original: repository name in lower case, dots as dashes (contract 2.5). Any other name is taken as a
Hugging Face id (`owner/name`) or a local folder. Nothing here loads or downloads anything.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from rewardsmith.errors import ConfigError

EMBEDDED = Path(__file__).parent / "demo" / "model"


@dataclass(frozen=True)
class BaseModel:
    """`source` is a Hugging Face id or a folder; `context` the longest prompt plus completion in tokens."""

    alias: str
    source: str
    context: int


def _qwen2_5(size: str) -> list[BaseModel]:
    alias = f"qwen2-5-{size.lower().replace('.', '-')}"
    return [
        BaseModel(alias, f"Qwen/Qwen2.5-{size}", 32768),
        BaseModel(f"{alias}-instruct", f"Qwen/Qwen2.5-{size}-Instruct", 32768),
    ]


_MODELS = [
    BaseModel("countdown-tiny", str(EMBEDDED), 1024),
    *(model for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B") for model in _qwen2_5(size)),
    BaseModel("qwen2-5-coder-7b-instruct", "Qwen/Qwen2.5-Coder-7B-Instruct", 32768),
    BaseModel("qwen2-5-coder-32b-instruct", "Qwen/Qwen2.5-Coder-32B-Instruct", 32768),
    BaseModel("qwen3-8b", "Qwen/Qwen3-8B", 32768),
    BaseModel("qwen3-14b", "Qwen/Qwen3-14B", 32768),
    BaseModel("qwen3-32b", "Qwen/Qwen3-32B", 32768),
    BaseModel("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 32768),
    BaseModel("llama-3-1-8b", "meta-llama/Llama-3.1-8B", 131072),
    BaseModel("llama-3-1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", 131072),
    BaseModel("llama-3-2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 131072),
    BaseModel("llama-3-2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", 131072),
    BaseModel("mistral-7b-instruct-v0-2", "mistralai/Mistral-7B-Instruct-v0.2", 32768),
]
ALIASES = {model.alias: model for model in _MODELS}


def source_of(name: str) -> str:
    """The Hugging Face id or absolute folder behind `name`. Raises ConfigError for a name that can be neither."""
    if name in ALIASES:
        return ALIASES[name].source
    if Path(name).is_dir():
        return str(Path(name).absolute())
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"base_model {name!r}: there is no such folder where the server runs")
    if name.count("/") == 1:
        return name
    near = difflib.get_close_matches(name, ALIASES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"aliases: {', '.join(ALIASES)}"
    raise ConfigError(
        f"base_model {name!r} is no known alias, no folder here and no Hugging Face id (owner/name); {hint}"
    )
