"""A decoder's weights for the fast path: layers that read the same input fused into one, and an adapter bound to them.

The base is never written to. Fused base weights are the storage that the transformers model reads too, as views; the
merged copy (base + scaling * B A) is made anew from the pristine base at every delivery, so rounding never adds up
(peers lose the base model to merging and unmerging in place). `verify` proves on sampled rows that base and merged copy
are what was loaded and delivered; how, and what that leaves out, is in `delivery`. Nothing here trains or samples, and
nothing needs transformers once `fuse` is done: another process that receives a pickled Weights whose tensors are shared
reads the same memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rewardsmith.errors import DeliveryError, ModelError
from rewardsmith.rollout.adapter import low_rank_pairs, tensor_names
from rewardsmith.rollout.model import delivery
from rewardsmith.rollout.model.architecture import LINEAR, Architecture, base_of, layer_modules
from rewardsmith.rollout.model.projection import Part, Projection

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["LayerWeights", "Part", "Projection", "Weights"]

NORMS = ("input_norm", "q_norm", "k_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
ALIGNMENT = 64  # bytes to which tensors in one storage begin


@dataclass(eq=False)
class LayerWeights:
    """Norm weights have the family's offset added already. Gemma has norms after attention and MLP, Qwen3 on q and k.

    With an offset they are float32 at least, and a norm multiplies before it rounds to the model's precision.
    """

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
    def fuse(cls, model: PreTrainedModel | PeftModel, architecture: Architecture) -> Weights:
        """Of a model that `describe` knows, with or without PEFT's layers in it; its weights become views."""
        model = base_of(model)
        decoder = model.get_submodule(architecture.path)
        return cls(
            architecture=architecture,
            embed_VH=decoder.get_submodule("embed_tokens").get_parameter("weight").detach(),
            layers=[_layer(decoder, i, architecture) for i in range(len(architecture.layers))],
            norm=_norm(decoder.get_submodule("norm"), architecture),
            head_VH=model.get_submodule("lm_head").get_parameter("weight").detach(),
        )

    @property
    def projections(self) -> list[Projection]:
        return [projection for layer in self.layers for projection in layer.projections]

    @property
    def parts(self) -> list[Part]:
        return [part for projection in self.projections for part in projection.parts]

    @property
    def bound_modules(self) -> int:
        """How many linear layers the adapter is on."""
        return sum(len(projection.bound) for projection in self.projections)

    @property
    def merged(self) -> bool:
        """Whether no linear layer has to apply an adapter beside its weights."""
        return all(projection.merged for projection in self.projections)

    def bind(self, tensors: Mapping[str, Tensor], scaling: float, merge: bool | None = None) -> None:
        """Makes room for an adapter of these names and shapes, all zeros. Raises DeliveryError when one fits nowhere.

        `merge`: whether to keep a merged copy, which costs the memory of the weights that the adapter is on and saves
        two small products per layer. Both give the same up to rounding, but in 16 bits that rounding is larger than the
        adapter's first steps, which would be lost: there the default is not to merge.
        """
        if merge is None:
            merge = self.embed_VH.element_size() > 2
        found = low_rank_pairs(tensors)
        parts = {part.name: (projection, part) for projection in self.projections for part in projection.parts}
        for path, (a_RI, b_OR) in found.items():
            if path not in parts:
                raise DeliveryError(f"the adapter is on {path}, which is no linear layer of this model")
            projection, part = parts[path]
            shape = (part.stop - part.start, projection.base_OI.shape[1])
            if (b_OR.shape[0], a_RI.shape[1]) != shape:
                raise DeliveryError(f"the adapter has another shape than {path}, which is {shape[0]} x {shape[1]}")
        for projection in self.projections:
            projection.scaling, projection.merged_OI = scaling, None
            for part in projection.parts:
                part.a_RI = part.b_OR = part.merged_from = None
        self.scaling = scaling
        rooms = iter(_together([t for pair in found.values() for t in pair], zeros=True))
        for path in found:
            part = parts[path][1]
            part.a_RI, part.b_OR = next(rooms), next(rooms)
        if merge:
            bound = [parts[path] for path in found]
            for (projection, part), sample in zip(bound, _together([p.sample() for _, p in bound]), strict=True):
                part.merged_from = sample
                if projection.merged_OI is None:
                    projection.merged_OI = projection.base_OI.clone()

    def adapter(self) -> dict[str, Tensor]:
        """The bound adapter's tensors by PEFT's names, sorted; what the next token is computed with."""
        tensors: dict[str, Tensor] = {}
        for part in self.parts:
            if part.a_RI is not None and part.b_OR is not None:
                tensors |= zip(tensor_names(part.name), (part.a_RI, part.b_OR), strict=True)
        return dict(sorted(tensors.items()))

    def merge(self, shard: int = 0, shards: int = 1) -> None:
        """Rebuilds the merged copy, where there is one, or only every `shards`-th projection of it from `shard` on:
        processes that share the memory divide the work.
        """
        for projection in self.projections[shard::shards]:
            projection.merge()

    def verify(self, step: int) -> None:
        """One row of every linear layer, another one each step. Raises DeliveryError that names the layer and cause."""
        looks = []
        for projection in self.projections:
            if projection.bound and projection.scaling != self.scaling:
                name = projection.parts[0].name
                raise DeliveryError(f"{name} applies its adapter times {projection.scaling}, not {self.scaling}")
            for part in projection.parts:
                # A stride that is prime to most sizes: over the steps all rows have their turn.
                number = part.start + step * 7919 % (part.stop - part.start)
                looks.append(delivery.Look(projection, part, number))
        if faults := delivery.faults(looks):
            more = f"; {len(faults) - 1} more of {len(looks)} linear layers are wrong too" if faults[1:] else ""
            raise DeliveryError(f"the engine does not run the delivered adapter: {faults[0]}{more}")

    def on(self, device: str) -> Weights:
        """A copy on `device`, tied tensors tied."""
        tensors = [self.embed_VH, self.head_VH, self.norm]
        for layer in self.layers:
            tensors += [t for name in NORMS if (t := getattr(layer, name)) is not None]
        for p in self.projections:
            tensors += [t for t in (p.base_OI, p.bias_O, p.merged_OI, p.row_checks_O) if t is not None]
        tensors += [t for p in self.parts for t in (p.a_RI, p.b_OR, p.merged_from) if t is not None]
        tensors += [kind.rope.inv_freq_F for kind in self.architecture.layers]
        moved = {id(tensor): tensor.to(device, copy=True) for tensor in tensors}
        if self.embed_VH.data_ptr() == self.head_VH.data_ptr():
            moved[id(self.head_VH)] = moved[id(self.embed_VH)]
        return copy.deepcopy(self, moved)

    def share(self) -> None:
        """Moves all tensors into memory that other processes can read; on CUDA they are readable as they are.

        The transformers model goes on reading the same memory for its linear layers and embeddings. What is bound later
        is not shared. Raises ModelError when there is not enough shared memory.
        """
        if self.embed_VH.device.type != "cpu":
            return
        # Every storage is one open file, so the many small tensors go together.
        small: list[tuple[object, str]] = [(self, "norm")]
        small += [(layer, name) for layer in self.layers for name in NORMS if getattr(layer, name) is not None]
        small += [
            (p, name) for p in self.projections for name in ("bias_O", "row_checks_O") if getattr(p, name) is not None
        ]
        together = _together([getattr(owner, name) for owner, name in small])
        large = [t for p in self.projections for t in (p.base_OI, p.merged_OI) if t is not None]
        adapter = [t for p in self.parts for t in (p.a_RI, p.b_OR, p.merged_from) if t is not None]
        try:
            for tensor in (self.embed_VH, self.head_VH, *large, *adapter, *together):
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ModelError(
                f"shared memory has no room for the model's weights; in a container, raise --shm-size ({error})"
            ) from error
        for (owner, name), tensor in zip(small, together, strict=True):
            setattr(owner, name, tensor)


def _layer(decoder: nn.Module, index: int, architecture: Architecture) -> LayerWeights:
    layer, path = decoder.get_submodule(f"layers.{index}"), f"{architecture.path}.layers.{index}"
    return LayerWeights(
        **{
            role: _fused(layer, path, names) if role in LINEAR else _norm(layer.get_submodule(names[0]), architecture)
            for role, names in layer_modules(architecture).items()
        }  # type: ignore[arg-type]
    )


def _norm(module: nn.Module, architecture: Architecture) -> Tensor:
    weight = module.get_parameter("weight").detach()
    if not architecture.norm_offset:
        return weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + architecture.norm_offset


def _fused(layer: nn.Module, path: str, names: tuple[str, ...]) -> Projection:
    """The named linear layers as one; their own weights become views of its rows."""
    modules = [layer.get_submodule(name) for name in names]
    linears = [module.get_submodule("base_layer") if hasattr(module, "base_layer") else module for module in modules]
    weights = [linear.get_parameter("weight") for linear in linears]
    fused_OI = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach().contiguous()
    parts, start = [], 0
    for name, weight in zip(names, weights, strict=True):
        stop = start + weight.shape[0]
        weight.data = fused_OI[start:stop]
        parts.append(Part(f"{path}.{name}", start, stop))
        start = stop
    biases = [getattr(linear, "bias", None) for linear in linears]
    bias_O = None
    if any(bias is not None for bias in biases):
        bias_O = torch.cat(
            [fused_OI.new_zeros(len(w)) if b is None else b.detach() for b, w in zip(biases, weights, strict=True)]
        )
    return Projection(fused_OI, bias_O, parts)


def _together(tensors: Iterable[Tensor], zeros: bool = False) -> list[Tensor]:
    """Copies of the tensors, or zeros in their shapes, in one storage for each type."""
    tensors, ends = list(tensors), dict[torch.dtype, int]()
    starts = []
    for tensor in tensors:
        starts.append(ends.get(tensor.dtype, 0))
        unit = ALIGNMENT // tensor.element_size()
        ends[tensor.dtype] = starts[-1] + -(-tensor.numel() // unit) * unit
    storages = {dtype: torch.zeros(end, dtype=dtype, device=tensors[0].device) for dtype, end in ends.items()}
    views = [storages[t.dtype][i : i + t.numel()].view(t.shape) for t, i in zip(tensors, starts, strict=True)]
    if not zeros:
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor)
    return views
