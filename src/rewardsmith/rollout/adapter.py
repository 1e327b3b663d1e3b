"""The tensors of a LoRA adapter under the names PEFT saves them by, and their fingerprint.

Trainer and engine each take the fingerprint of the tensors they really use; equal fingerprints are the proof that the
engine runs the policy. Files are not read or written here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewardsmith.errors import DeliveryError

if TYPE_CHECKING:
    from peft import PeftModel

PREFIX = "base_model.model."  # what PEFT puts before a module's path


def adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The live tensors of one adapter, sorted by plain name (without the adapter's own); writing to them changes it."""
    from peft import get_peft_model_state_dict  # brings transformers, which processes that only sample do without

    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensors[name].detach() for name in sorted(tensors)}


def tensor_names(path: str) -> tuple[str, str]:
    """Of A and B of the linear layer at `path` in the base model."""
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def low_rank_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (R x I) and B (O x R) by the paths of their layers. Raises DeliveryError unless the adapter is plain LoRA."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B") or tensor.ndim != 2:
            raise DeliveryError(f"the adapter has {name}, which is no part of plain LoRA on a linear layer")
        found.setdefault(path, {})[kind] = tensor
    pairs = {}
    for path, pair in found.items():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise DeliveryError(f"the adapter's lora_A and lora_B for {path} do not belong together")
        pairs[path] = (pair["lora_A"], pair["lora_B"])
    return pairs


def take_over(mine: Mapping[str, Tensor], policy: Mapping[str, Tensor], version: int) -> None:
    """Copies the policy's tensors into an engine's own. Raises DeliveryError when names or shapes differ."""
    misfit = f"policy version {version} does not fit the engine's adapter"
    if odd := sorted(mine.keys() ^ policy.keys()):
        raise DeliveryError(f"{misfit}: {len(odd)} names differ, first {odd[0]}")
    for name, tensor in mine.items():
        if tensor.shape != policy[name].shape:
            raise DeliveryError(f"{misfit}: {name} has another shape")
        tensor.copy_(policy[name])


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of each tensor over its dtype, shape and bytes, by name."""

    tensors: dict[str, str]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Fingerprint:
        return cls({name: _sha256(tensor) for name, tensor in tensors.items()})

    @cached_property
    def digest(self) -> str:
        """One SHA-256 over all names and tensors."""
        lines = "".join(f"{name} {self.tensors[name]}\n" for name in sorted(self.tensors))
        return hashlib.sha256(lines.encode()).hexdigest()

    def difference(self, other: Fingerprint) -> str:
        """How `other` differs, in words; empty when it does not."""
        missing = sorted(self.tensors.keys() - other.tensors.keys())
        foreign = sorted(other.tensors.keys() - self.tensors.keys())
        changed = sorted(n for n in self.tensors.keys() & other.tensors.keys() if self.tensors[n] != other.tensors[n])
        found = [(missing, "missing"), (foreign, "unknown"), (changed, "different")]
        return ", ".join(f"{len(names)} {word} (first: {names[0]})" for names, word in found if names)


def _sha256(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype} {tuple(content.shape)} ".encode())
    digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()
