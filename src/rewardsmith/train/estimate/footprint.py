"""How much memory a run takes at its peak: arithmetic on the shapes of a model that is laid out without its weights.

It follows what the engine, the update and the ranks keep and for how long; the constants that no shape tells were
measured. How long a step takes is the business of `calibration`, what a running job holds that of `forecast`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ModelError
from rewardsmith.rollout.fast import blocked
from rewardsmith.rollout.fast.engine import SLOTS
from rewardsmith.train.estimate.calibration import Load
from rewardsmith.train.fast.head import CHUNK_LOGITS
from rewardsmith.train.fast.memory import SHARE, micro_batch, row_numbers
from rewardsmith.train.learner import MERGED_SHARE
from rewardsmith.train.lora import LINEAR
from rewardsmith.train.parallel.rank import sharing_memory
from rewardsmith.train.plain import MICRO_BATCH_LOGITS, MICRO_BATCH_TOKENS

WORKER_BYTES = 60 * 2**20  # what a forked worker comes to own of the interpreter and of torch
ADAPTER_BYTES = 4  # PEFT keeps adapters in float32
PLAIN_EXCESS = 3  # what autograd keeps of a layer under PEFT, over what the fast path keeps
SLACK = 1.1  # what allocators leave unused between blocks


@dataclass(frozen=True)
class Shape:
    """The numbers of a model. `weights` are all of its parameters, `linear` those of the layers LoRA can go on,
    `adapted` those of the layers it does go on, `adapter` its own.

    `qk_norms`, `post_norms`: whether a layer has these beside its two.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int | None
    weights: int
    linear: int
    adapted: int
    adapter: int
    qk_norms: bool = False
    post_norms: bool = False

    def row_numbers(self, recompute: bool = False) -> int:
        """`memory.row_numbers` of this model."""
        return row_numbers(
            layers=self.layers,
            hidden=self.hidden,
            intermediate=self.intermediate,
            q=self.heads * self.head_dim,
            kv=self.kv_heads * self.head_dim,
            qk_norms=self.qk_norms,
            post_norms=self.post_norms,
            recompute=recompute,
        )

    def with_layers(self, layers: int) -> Shape:
        linear = self.linear * layers // self.layers
        return replace(
            self,
            layers=layers,
            linear=linear,
            weights=self.weights - self.linear + linear,
            adapted=self.adapted * layers // self.layers,
            adapter=self.adapter * layers // self.layers,
        )

    def cache_numbers(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for; `generation` and `update` come one after the other. `available` is for all of it."""

    parts: Mapping[str, int]
    generation: int
    update: int
    available: int
    micro_batch_tokens: int

    @property
    def peak(self) -> int:
        return int(sum(self.parts.values()) + SLACK * max(self.generation, self.update))

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


def lay_out(model_config: PretrainedConfig, config: GRPOConfig) -> Shape:
    """The model's shapes from its modules, made without weights. Raises ModelError when it is no language model."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{model_config.model_type!r} models cannot be trained here: {reason}") from None
    text: Any = model_config.get_text_config(decoder=True)
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR) and module != head}
    wanted = config.target_modules
    adapted = [
        module.weight
        for name, module in linear.items()
        if wanted is None or any(name == target or name.endswith(f".{target}") for target in wanted)
    ]
    heads = text.num_attention_heads
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return Shape(
        family=str(model_config.model_type),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None),
        weights=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(module.weight.numel() for module in linear.values()),
        adapted=sum(weight.numel() for weight in adapted),
        adapter=config.rank * sum(sum(weight.shape) for weight in adapted),
        qk_norms="q_norm" in modules,
        post_norms="post_feedforward_layernorm" in modules,
    )


def need(
    shape: Shape, load: Load, *, device: torch.device, ranks: int, own: int, available: int, fast: bool = True
) -> Memory:
    """Bytes at the peak of a step. `own` is what the first process holds before it has a model."""
    item = 2 if device.type == "cuda" else 4
    ranks = sharing_memory(ranks, device.type)
    # Parameter, gradient and both moments; the engine's copy; each rank's gradient, once while it is summed up.
    copies = 5 + 2 * ranks if fast else 5
    # In half precision, and where memory is short, the adapter is applied beside the weights.
    merged = fast and item > 2 and item * shape.linear <= MERGED_SHARE * (available - item * shape.weights)
    parts = {
        "model": item * shape.weights,
        "merged copy": item * shape.adapted if merged else 0,
        "adapter, optimizer": ADAPTER_BYTES * copies * shape.adapter,
        "processes": 0 if device.type == "cuda" else own + (ranks - 1) * WORKER_BYTES,
    }
    free = max(0, available - sum(parts.values()))
    update, rows = _update(shape, load, device.type, item, ranks, free, fast)
    return Memory(parts, _generation(shape, load, device.type, item, ranks, free, fast), update, available, rows)


def _generation(shape: Shape, load: Load, device: str, item: int, ranks: int, free: int, fast: bool) -> int:
    """The cache of all that is sampled at a time, the logits of its next token, and each rank's blocked weights."""
    slots = min(load.completions, SLOTS[device] * ranks) if fast else load.completions
    prompts = -(-slots // load.group) if fast else slots  # the plain engine has a copy for each completion
    one = item * shape.cache_numbers() * (load.prompt_tokens + load.longest)
    cache = item * shape.cache_numbers() * (prompts * load.prompt_tokens + slots * load.longest)
    copies = 0
    if fast and device == "cpu":
        linear, head = item * shape.linear, item * shape.hidden * shape.vocab
        most = blocked.most_bytes(free, ranks)
        copies = ranks * blocked.bytes_of_copies(linear, shape.layers, head, slots // ranks, most)
    return int(max(one, min(cache, SHARE * free))) + 4 * slots * shape.vocab * 4 + copies


def _update(shape: Shape, load: Load, device: str, item: int, ranks: int, free: int, fast: bool) -> tuple[int, int]:
    """Bytes of a micro-batch of every rank, and its tokens."""
    row, again = item * shape.row_numbers(), item * shape.row_numbers(recompute=True)
    longest = load.prompt_tokens + load.longest - 1  # the last token is not fed
    if not fast:
        rows = min(MICRO_BATCH_TOKENS, MICRO_BATCH_LOGITS // shape.vocab, load.completions * longest)
        rows = max(longest, rows)
        return rows * row * PLAIN_EXCESS + 3 * 4 * rows * shape.vocab, rows
    rows, recompute = micro_batch(row, again, load.prompt_tokens, longest, SHARE * free / ranks, device)
    rows = max(longest, min(rows, load.packed_tokens // ranks))
    logits = min(CHUNK_LOGITS[device], rows * shape.vocab)
    return ranks * (rows * (again if recompute else row) + 3 * 4 * logits), rows
