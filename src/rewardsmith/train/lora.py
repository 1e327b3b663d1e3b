"""The policy as a LoRA adapter: made, continued, handed to the engine, turned into the files PEFT reads.

One frozen base carries the adapter POLICY, which is trained; on the plain path it carries ROLLOUT too, the engine's own
copy (the fast engine has one of its own). Only a delivery changes the engine's copy, and it is not done before
fingerprints prove it. The base is never written to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rewardsmith.config import GRPOConfig
from rewardsmith.errors import ConfigError, DeliveryError, ModelError
from rewardsmith.rollout.adapter import Fingerprint, adapter_tensors
from rewardsmith.rollout.engine import Engine

POLICY, ROLLOUT = "policy", "rollout"
LINEAR = (torch.nn.Linear, Conv1D)  # Conv1D: what GPT-2 calls its linear layers
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def attach(base: PreTrainedModel, config: GRPOConfig, base_name: str) -> PeftModel:
    """The base with a new adapter, POLICY: B zero, A by `config.seed`.

    Without `target_modules`, LoRA goes to all linear layers but the head.

    Raises ConfigError when `target_modules` names anything else than linear layers of the base.
    """
    _check_targets(base, config.target_modules or [])
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    model = get_peft_model(base, settings, adapter_name=POLICY)
    model.peft_config[POLICY].base_model_name_or_path = base_name
    return model


def add_rollout_adapter(model: PeftModel) -> None:
    """ROLLOUT beside POLICY, of the same shape: for an engine that runs the PEFT model itself."""
    model.add_adapter(ROLLOUT, copy(model.peft_config[POLICY]))
    model.set_adapter(POLICY)


def _check_targets(base: PreTrainedModel, targets: list[str]) -> None:
    """PEFT passes over a name without a layer, and its adapters of embeddings have another shape than ours."""
    found = {
        target: [m for name, m in base.named_modules() if name == target or name.endswith(f".{target}")]
        for target in targets
    }
    unknown = [target for target in targets if not found[target]]
    other = [target for target in targets if not all(isinstance(module, LINEAR) for module in found[target])]
    for names, what in ((unknown, "the base model has no such layer"), (other, "LoRA goes on linear layers only")):
        if names:
            linear = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, LINEAR)}
            raise ConfigError(
                f"GRPOConfig.target_modules={names}: {what}. Its linear layers: {', '.join(sorted(linear))}"
            )


def named_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The policy's trainable parameters, always in the same order, by the names of `adapter_tensors`."""
    return {
        name.replace(f".{POLICY}.", "."): parameter
        for name, parameter in model.named_parameters()
        if f".{POLICY}." in name
    }


def parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    return list(named_parameters(model).values())


def deliver(model: PeftModel, engine: Engine, version: int) -> None:
    """Gives the policy to the engine. Raises DeliveryError unless the engine then holds it bit for bit."""
    policy = adapter_tensors(model, POLICY)
    engine.load_adapter(policy, version)
    difference = Fingerprint.of(policy).difference(engine.fingerprint())
    if difference:
        raise DeliveryError(
            f"the engine does not run policy version {version}: of its {len(policy)} adapter tensors, {difference}. "
            "Sampling with another policy would train on false data, so the job ends here"
        )


def continue_from(model: PeftModel, folder: Path, config: GRPOConfig) -> None:
    """Starts the policy from a saved adapter. Raises ModelError or ConfigError when it does not fit this run."""
    try:
        saved = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"the adapter to continue from cannot be read ({CONFIG_FILE} and {WEIGHTS_FILE} are needed): {error}"
        ) from None
    for field, ours, theirs in (
        ("rank", config.rank, saved.get("r")),
        ("lora_alpha", config.lora_alpha, saved.get("lora_alpha")),
    ):
        if ours != theirs:
            raise ConfigError(f"GRPOConfig.{field}={ours}, but the adapter to continue from has {theirs}: leave it out")
    load(model, tensors, "the adapter to continue from")


def load(model: PeftModel, tensors: Mapping[str, Tensor], what: str) -> None:
    """Sets the policy's tensors by plain names, all of them. Raises ModelError naming `what` when they do not fit."""
    mine = adapter_tensors(model, POLICY)
    odd = sorted(mine.keys() ^ tensors.keys())
    odd = odd or [name for name in mine if mine[name].shape != tensors[name].shape]
    if odd:
        raise ModelError(f"{what} has other layers or shapes than this run's: {len(odd)} tensors, first {odd[0]}")
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])


def files(model: PeftModel) -> dict[str, bytes]:
    """The policy in PEFT's format, by file name: `PeftModel.from_pretrained` loads it as it is."""
    settings: dict[str, Any] = model.peft_config[POLICY].to_dict() | {"inference_mode": True}
    text = json.dumps(settings, indent=2, sort_keys=True, default=_plain)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model, POLICY).items()}
    return {CONFIG_FILE: text.encode() + b"\n", WEIGHTS_FILE: save(tensors, metadata={"format": "pt"})}


def _plain(value: object) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
