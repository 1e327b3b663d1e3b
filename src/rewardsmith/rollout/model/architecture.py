"""What a decoder computes, in numbers: enough to run it without transformers.

`describe` reads a loaded model of a family that is known exactly and refuses every other with the reason; a refused
model runs on the plain path. Exactly means: as transformers computes it, up to rounding. Where the numbers of a config
and the modelling code disagree, the code decides. The weights are in `weights`, the computation in `layers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# What transformers calls a family in a config: the class that computes it.
CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",  # its language model; images are not read
    "phi3": "Phi3ForCausalLM",  # Phi-3, 3.5 and 4
}
FAMILIES = tuple(CLASSES)
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Frequencies that are the same for every sequence; longrope's are within the context the model was first trained with.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


LINEAR = ("qkv", "out", "gate_up", "down")  # of the roles in `layer_modules`; the others are norms


class Unsupported(Exception):
    """Why the fast path cannot run a model; the text completes "runs on the plain path: ..."."""


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary positions: at position p, numbers i and F + i of a head turn by the angle p * inv_freq_F[i], i < F.

    The angle is a float32 product. The numbers from 2 F on do not turn (Phi).
    """

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

    `attention_softcap` bounds the scaled scores before the mask, `logit_softcap` the logits: cap * tanh(x / cap).
    `embed_scale` is rounded to the model's own precision, as it was trained.
    `context` is the most tokens that prompt and completion may have together, None where the model names no limit. For
    longrope it is the context of the first training: beyond it the frequencies would depend on the batch.
    `path` is where the decoder sits in the transformers model.
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
    path: str = "model"


def describe(model: PreTrainedModel | PeftModel) -> Architecture:
    """Of a model as transformers loads it, with or without PEFT's layers in it. Raises Unsupported.

    An adapter in the model is judged too: only plain LoRA without dropout on the decoder's linear layers is computed,
    and only while it is not merged into them.
    """
    model = base_of(model)
    family = str(model.config.model_type)
    if type(model).__name__ != CLASSES.get(family):
        raise Unsupported(_not_known(model))
    path = "model.language_model" if family == "gemma3" else "model"
    decoder: Any = model.get_submodule(path)
    config: Any = decoder.config
    gemma = family.startswith("gemma")
    activation = config.hidden_activation if gemma else config.hidden_act
    if activation not in ACTIVATIONS:
        raise Unsupported(f"its activation is {activation!r}, not one of {', '.join(ACTIVATIONS)}")
    if getattr(config, "use_bidirectional_attention", None):
        raise Unsupported("its tokens attend to later ones")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ropes, context = _ropes(decoder.rotary_emb, config, family, head_dim)
    architecture = Architecture(
        family="gemma3" if family == "gemma3_text" else family,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        layers=tuple(LayerKind(ropes.get(kind, ropes[""]), window) for kind, window in _windows(config, family)),
        norm_epsilon=config.rms_norm_eps,
        norm_offset=1.0 if gemma else 0.0,
        gate=ACTIVATIONS[activation],
        attention_scale=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        # Gemma 3's config has the field, its code does not read it.
        attention_softcap=config.attn_logit_softcapping if family == "gemma2" else None,
        logit_softcap=config.final_logit_softcapping if family in ("gemma2", "gemma3_text") else None,
        embed_scale=float(decoder.embed_tokens.embed_scale.to(decoder.embed_tokens.weight.dtype)) if gemma else 1.0,
        context=context,
        path=path,
    )
    _check_modules(model, architecture)
    return architecture


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model in a PEFT model, its layers replaced by PEFT's."""
    return cast("PreTrainedModel", getattr(model, "get_base_model", lambda: model)())


def layer_modules(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """The modules of one decoder layer by what they are in `weights.LayerWeights`, several where they are fused."""
    phi3, gemma = architecture.family == "phi3", architecture.family in ("gemma2", "gemma3")
    modules: dict[str, tuple[str, ...]] = {
        "input_norm": ("input_layernorm",),
        "qkv": ("self_attn.qkv_proj",) if phi3 else tuple(f"self_attn.{name}_proj" for name in "qkv"),
        "out": ("self_attn.o_proj",),
        "mlp_norm": ("pre_feedforward_layernorm" if gemma else "post_attention_layernorm",),
        "gate_up": ("mlp.gate_up_proj",) if phi3 else ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
    if architecture.family in ("qwen3", "gemma3"):
        modules |= {"q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",)}
    if gemma:
        modules |= {
            "post_attention_norm": ("post_attention_layernorm",),
            "post_mlp_norm": ("post_feedforward_layernorm",),
        }
    return modules


def _not_known(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    what = "a mixture of experts" if any(getattr(config, name, None) for name in experts) else "not among them"
    return f"{type(model).__name__} is {what}; known exactly are {', '.join(sorted(CLASSES.values()))}"


def _ropes(rotary: Any, config: Any, family: str, head_dim: int) -> tuple[dict[str, Rope], int | None]:
    """By kind of layer, "" for any; and the context within which they hold."""
    # Gemma 3 has other positions in the layers with a window.
    prefixes = (
        {f"{k}_": k for k in ("full_attention", "sliding_attention")} if family.startswith("gemma3") else {"": ""}
    )
    types: dict[str, str] = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
    context: int | None = config.max_position_embeddings
    ropes: dict[str, Rope] = {}
    for prefix, kind in prefixes.items():
        if kind not in types:  # no layer of this kind
            continue
        if types[kind] not in ROPE_TYPES:
            raise Unsupported(f"its rotary positions are of type {types[kind]!r}, not one of {', '.join(ROPE_TYPES)}")
        if types[kind] == "longrope":
            parameters = config.rope_parameters[kind] if kind else config.rope_parameters
            first: int = parameters["original_max_position_embeddings"]
            context = first if context is None else min(first, context)
        # A long sequence changes longrope's `inv_freq` in place.
        first_or_only = "original_inv_freq" if types[kind] == "longrope" else "inv_freq"
        inv_freq_F: Tensor = getattr(rotary, prefix + first_or_only)
        turned = 2 * inv_freq_F.numel()
        if turned > head_dim or (turned != head_dim and family != "phi3"):
            raise Unsupported(f"{turned} of the {head_dim} numbers of a head have rotary positions")
        scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
        ropes[kind] = Rope(inv_freq_F.detach().float().clone(), scaling)
    return {"": next(iter(ropes.values()))} | ropes, context


def _windows(config: Any, family: str) -> Iterator[tuple[str, int | None]]:
    """Kind and window of each layer."""
    window: int | None = getattr(config, "sliding_window", None)
    if family in ("mistral", "phi3"):  # one for all layers, whatever `layer_types` says
        yield from [("", window)] * config.num_hidden_layers
    elif family == "llama":
        if window is not None:
            raise Unsupported("a Llama with a sliding window")
        yield from [("", None)] * config.num_hidden_layers
    else:
        for kind in config.layer_types[: config.num_hidden_layers]:
            if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and window is None):
                raise Unsupported(f"it has layers of type {kind!r} with a window of {window}")
            yield kind, window if kind == "sliding_attention" else None


def _check_modules(model: PreTrainedModel, architecture: Architecture) -> None:
    """Nothing in the model may be left out of the computation, or be of another kind than it has."""
    linear, other = set[str](), {f"{architecture.path}.embed_tokens", f"{architecture.path}.norm", "lm_head"}
    for role, names in layer_modules(architecture).items():
        found = linear if role in LINEAR else other
        found |= {f"{architecture.path}.layers.{i}.{name}" for i in range(len(architecture.layers)) for name in names}
    kinds = set()
    for name, parameter in model.named_parameters():
        path, lora, _ = name.partition(".lora_")
        if lora:
            _check_adapter(model, path, linear, name)
        elif name.startswith((f"{architecture.path}.", "lm_head.")):
            path, _, kind = name.rpartition(".")
            path = path.removesuffix(".base_layer")
            if kind not in (("weight", "bias") if path in linear else ("weight",)) or path not in linear | other:
                raise Unsupported(f"it has weights that are not known: {name}")
            kinds.add((parameter.dtype, parameter.device))
    if getattr(model.config, "quantization_config", None) or any(not d.is_floating_point for d, _ in kinds):
        raise Unsupported("its weights are quantised")
    if len(kinds) != 1:
        described = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise Unsupported(f"its weights are not all of one type on one device: {described}")
    if model.device.type == "meta":
        raise Unsupported("its weights are not in memory")
    for path in sorted(linear):
        module = model.get_submodule(path)
        if type(getattr(module, "base_layer", module)) is not nn.Linear:
            raise Unsupported(f"{path} is no plain linear layer but a {type(module).__name__}")


def _check_adapter(model: PreTrainedModel, path: str, linear: set[str], name: str) -> None:
    """The PEFT layer at `path`, which has a parameter `name`."""
    if path not in linear:
        raise Unsupported(f"an adapter is on {path}, which is no linear layer of the decoder")
    module: Any = model.get_submodule(path)
    if getattr(module, "lora_variant", None) or not name.endswith(".weight"):
        raise Unsupported(f"the adapter on {path} is no plain LoRA")
    if module.merged:
        raise Unsupported(f"an adapter is merged into {path}")
    if any(not isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values()):
        raise Unsupported("lora_dropout is on")
