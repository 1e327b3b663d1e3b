"""A decoder's weights for the fast path: layers that read the same input fused into one, and an adapter bound to them.

The base is never written to. Fused base weights are the storage that the transformers model reads too, as views; the
merged copy (base + scaling * B A) is made anew from the pristine base at every delivery, so rounding never adds up
(peers lose the base model to merging and unmerging in place). `verify` proves on sampled rows that what will be
multiplied with is the base it was and the adapter that was delivered. Nothing here trains or samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rewardsmith.errors import DeliveryError
from rewardsmith.rollout.architecture import Architecture

PREFIX = "base_model.model."  # what PEFT puts before a module's path


@dataclass(eq=False)
class Part:
    """One linear layer of the model: rows `start` to `stop` of a fused projection; with an adapter, A and B."""

    name: str
    start: int
    stop: int
    a_RI: Tensor | None = None
    b_OR: Tensor | None = None


@dataclass(eq=False)
class Projection:
    """Linear layers of one input as one. `weight_OI` is what is multiplied with: the base, or the merged copy."""

    base_OI: Tensor
    bias_O: Tensor | None
    parts: list[Part]
    scaling: float = 0.0
    merged_OI: Tensor | None = None
    row_checks_O: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.row_checks_O = _row_checks(self.base_OI)

    @property
    def merged(self) -> bool:
        """Whether `weight_OI` has the adapter in it."""
        return self.merged_OI is not None or not self.bound

    @property
    def weight_OI(self) -> Tensor:
        return self.base_OI if self.merged_OI is None else self.merged_OI

    @property
    def bound(self) -> list[Part]:
        return [part for part in self.parts if part.a_RI is not None]

    def add_low_rank(self, x: Tensor, y: Tensor) -> Tensor:
        """y + scaling * B A x, written into `y`."""
        for part in self.bound:
            assert part.a_RI is not None and part.b_OR is not None
            y[..., part.start : part.stop] += self.scaling * (x @ part.a_RI.T @ part.b_OR.T)
        return y

    def merge(self) -> None:
        """The merged copy from the pristine base and the bound adapter."""
        if not self.bound:
            return
        if self.merged_OI is None:
            self.merged_OI = self.base_OI.clone()
        for part in self.bound:
            assert part.a_RI is not None and part.b_OR is not None
            rows = slice(part.start, part.stop)
            torch.addmm(self.base_OI[rows], part.b_OR, part.a_RI, alpha=self.scaling, out=self.merged_OI[rows])

    def verify(self, row: int, scaling: float) -> None:
        """Raises DeliveryError unless the rows numbered `row` (modulo each part's) are what they have to be."""
        for part in self.parts:
            number = part.start + row % (part.stop - part.start)
            base_I = self.base_OI[number]
            if not torch.equal(_row_checks(base_I[None]), self.row_checks_O[number : number + 1]):
                raise DeliveryError(f"the base weights changed since they were loaded: row {number} of {part.name}")
            if part.a_RI is None or part.b_OR is None:
                continue
            if self.scaling != scaling:
                raise DeliveryError(f"{part.name} applies its adapter times {self.scaling}, not {scaling}")
            if self.merged_OI is None:
                continue
            low_rank_I = scaling * (part.b_OR[number - part.start] @ part.a_RI)
            wide = torch.promote_types(base_I.dtype, torch.float32)
            off_I = (self.merged_OI[number].to(wide) - (base_I.to(wide) + low_rank_I.to(wide))).abs()
            # Rounding of the sum and of its parts: a few units in the last place of what was added.
            room_I = 8 * torch.finfo(base_I.dtype).eps * (base_I.abs().to(wide) + low_rank_I.abs().to(wide))
            room = room_I + 8 * torch.finfo(base_I.dtype).eps * low_rank_I.abs().max().to(wide)
            if bool((off_I > room).any()):
                raise DeliveryError(
                    f"{part.name} does not run the delivered adapter: row {number} of its merged weights is off by "
                    f"{float(off_I.max()):.3g}"
                )


@dataclass(eq=False)
class LayerWeights:
    """Norm weights have the family's offset added already. Gemma has norms after attention and MLP, Qwen3 on q and k."""

    input_norm: Tensor
    qkv: Projection
    out: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    post_attention_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None

    @property
    def projections(self) -> list[Projection]:
        return [self.qkv, self.out, self.gate_up, self.down]


@dataclass(eq=False)
class Weights:
    """`embed_VH` and `head_VH` are one tensor in models that tie them."""

    architecture: Architecture
    embed_VH: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    head_VH: Tensor
    scaling: float = 0.0
    version: int = -1

    @classmethod
    def fuse(cls, model: PreTrainedModel, architecture: Architecture) -> Weights:
        """Of a model as transformers loads it, with or without PEFT's layers in it; its weights become views."""
        decoder = model.model
        return cls(
            architecture=architecture,
            embed_VH=decoder.embed_tokens.weight.detach(),
            layers=[_layer(layer, i, architecture) for i, layer in enumerate(decoder.layers)],
            norm=_norm(decoder.norm, architecture),
            head_VH=model.lm_head.weight.detach(),
        )

    @property
    def projections(self) -> list[Projection]:
        return [projection for layer in self.layers for projection in layer.projections]

    @property
    def parts(self) -> list[Part]:
        return [part for projection in self.projections for part in projection.parts]

    def bind(self, tensors: Mapping[str, Tensor], scaling: float) -> None:
        """Makes room for an adapter of these names and shapes, all zeros. Raises DeliveryError when one fits nowhere."""
        parts = {part.name: part for part in self.parts}
        for name, tensor in tensors.items():
            path, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            if path not in parts or kind not in ("lora_A", "lora_B"):
                raise DeliveryError(f"the adapter has {name}, which is no linear layer of this model")
            setattr(parts[path], "a_RI" if kind == "lora_A" else "b_OR", torch.zeros_like(tensor))
        for projection in self.projections:
            projection.scaling = scaling
        self.scaling = scaling

    def adapter(self) -> dict[str, Tensor]:
        """The bound adapter's tensors by PEFT's names, sorted; what the next token is computed with."""
        tensors = {}
        for part in self.parts:
            if part.a_RI is not None and part.b_OR is not None:
                tensors[f"{PREFIX}{part.name}.lora_A.weight"] = part.a_RI
                tensors[f"{PREFIX}{part.name}.lora_B.weight"] = part.b_OR
        return dict(sorted(tensors.items()))

    def merge(self) -> None:
        for projection in self.projections:
            projection.merge()

    def verify(self, step: int) -> None:
        """One row of every linear layer, another one each step. Raises DeliveryError that names the layer and cause."""
        for projection in self.projections:
            # A stride that is prime to most sizes: over the steps all rows have their turn.
            projection.verify(step * 7919, self.scaling)


def _layer(layer: nn.Module, index: int, architecture: Architecture) -> LayerWeights:
    attention, mlp, path = layer.self_attn, layer.mlp, f"model.layers.{index}"
    qk_normed = hasattr(attention, "q_norm")
    return LayerWeights(
        input_norm=_norm(layer.input_layernorm, architecture),
        qkv=_fused(attention, f"{path}.self_attn", ("q_proj", "k_proj", "v_proj")),
        q_norm=_norm(attention.q_norm, architecture) if qk_normed else None,
        k_norm=_norm(attention.k_norm, architecture) if qk_normed else None,
        out=_fused(attention, f"{path}.self_attn", ("o_proj",)),
        mlp_norm=_norm(layer.post_attention_layernorm, architecture),
        gate_up=_fused(mlp, f"{path}.mlp", ("gate_proj", "up_proj")),
        down=_fused(mlp, f"{path}.mlp", ("down_proj",)),
    )


def _norm(module: nn.Module, architecture: Architecture) -> Tensor:
    return module.weight.detach() + architecture.norm_offset if architecture.norm_offset else module.weight.detach()


def _fused(module: nn.Module, path: str, names: tuple[str, ...]) -> Projection:
    """The named linear layers as one; their own weights become views of its rows."""
    linears = [getattr(getattr(module, name), "base_layer", getattr(module, name)) for name in names]
    fused_OI = (
        torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight.detach()
    )
    parts, start = [], 0
    for name, linear in zip(names, linears, strict=True):
        stop = start + linear.weight.shape[0]
        linear.weight.data = fused_OI[start:stop]
        parts.append(Part(f"{path}.{name}", start, stop))
        start = stop
    bias_O = None
    if any(linear.bias is not None for linear in linears):
        bias_O = torch.cat([fused_OI.new_zeros(len(l.weight)) if l.bias is None else l.bias.detach() for l in linears])
    return Projection(fused_OI, bias_O, parts)


def _row_checks(weight_OI: Tensor) -> Tensor:
    """One number per row that a changed row changes too: its bits, each place times another odd number, summed up."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight_OI.element_size()]
    bits_OI = weight_OI.contiguous().view(whole).to(torch.int64)
    factors_I = torch.arange(weight_OI.shape[1], device=weight_OI.device) * 2 + 1
    return (bits_OI * factors_I).sum(1)
