"""What a decoder computes, in numbers: enough to run it without transformers.

`describe` reads a loaded model of a family that is known exactly and refuses every other with the reason; a refused
model runs on the plain path. The weights are in `weights`, the computation in `layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


class Unsupported(Exception):
    """Why the fast path cannot run a model; the text completes "runs on the plain path: ..."."""


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary positions: angle of pair i at position p is p * inv_freq_F[i]. The first 2 * F of a head's numbers turn."""

    inv_freq_F: Tensor
    scaling: float = 1.0  # of sine and cosine


@dataclass(frozen=True, eq=False)
class LayerKind:
    """What may differ between the layers of one model. `window` counts the tokens a token sees, itself included."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True, eq=False)
class Architecture:
    """`gate` is the activation of the gated MLP. `norm_offset` is what norms add to their stored weights.

    `context` is the most tokens that prompt and completion may have together, None where the model names no limit.
    """

    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerKind, ...]
    norm_epsilon: float
    norm_offset: float
    gate: Literal["silu", "gelu_tanh"]
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    embed_scale: float
    context: int | None


def describe(model: PreTrainedModel) -> Architecture:
    """Raises Unsupported."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise Unsupported(f"{type(model).__name__} is none of the families {', '.join(FAMILIES)}")
    if config.hidden_act != "silu":
        raise Unsupported(f"activation {config.hidden_act!r}")
    rope = _rope(model)
    windows = _windows(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Architecture(
        family=config.model_type,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        layers=tuple(LayerKind(rope, window) for window in windows),
        norm_epsilon=config.rms_norm_eps,
        norm_offset=0.0,
        gate="silu",
        attention_scale=head_dim**-0.5,
        attention_softcap=None,
        logit_softcap=None,
        embed_scale=1.0,
        context=getattr(config, "max_position_embeddings", None),
    )


def _rope(model: PreTrainedModel) -> Rope:
    rotary: Any = model.model.rotary_emb
    kind = getattr(rotary, "rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise Unsupported(f"rotary positions of type {kind!r}")
    return Rope(rotary.inv_freq.detach().float().clone(), float(rotary.attention_scaling))


def _windows(config: Any) -> list[int | None]:
    count: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * count
    return [window if kind == "sliding_attention" else None for kind in kinds]
