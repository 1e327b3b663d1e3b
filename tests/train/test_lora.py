import json
from pathlib import Path

import pytest
import torch
from job_runs import config
from peft import PeftModel
from tiny_models import CONTEXT, FAMILIES, WORDS, random_model, tokenizer

from rewardsmith.errors import ConfigError, DeliveryError, ModelError
from rewardsmith.rollout.adapter import Fingerprint, adapter_tensors
from rewardsmith.rollout.plain import PlainEngine
from rewardsmith.train import lora
from rewardsmith.train.lora import POLICY, ROLLOUT
from rewardsmith.train.update import make_optimizer

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.tensor([[5, 6, 7, 9, 2, 2], [3, 20, 4, 4, 8, 1]])


def trained(family: str = "qwen2", **changes) -> PeftModel:
    model = lora.attach(random_model(family), config(**changes), "some/base")
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_tensors(model, POLICY).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    lora.add_rollout_adapter(model)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def write(model: PeftModel, folder: Path) -> Path:
    for name, content in lora.files(model).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_new_adapter_changes_nothing_and_sits_on_all_linear_layers_but_the_head():
    model = lora.attach(random_model("llama"), config(), "some/base")
    assert torch.equal(logits(model), logits(random_model("llama")))
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_tensors(model, POLICY)}
    assert modules == LINEAR
    assert len(adapter_tensors(model, POLICY)) == 2 * 2 * len(LINEAR)
    assert len(lora.parameters(model)) == 2 * 2 * len(LINEAR)


def test_a_new_adapter_is_a_function_of_the_seed():
    prints = [
        Fingerprint.of(adapter_tensors(lora.attach(random_model("qwen2"), config(seed=seed), "b"), POLICY)).digest
        for seed in (5, 5, 6)
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_saved_adapter_to_the_same_logits_bit_for_bit(family: str, tmp_path: Path):
    model = trained(family, lora_dropout=0.1)
    loaded = PeftModel.from_pretrained(random_model(family), write(model, tmp_path))
    model.set_adapter(POLICY)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(random_model(family)))


def test_the_saved_config_is_complete(tmp_path: Path):
    saved = json.loads((write(trained(), tmp_path) / "adapter_config.json").read_text())
    expected = {"base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM", "peft_type": "LORA", "bias": "none"}
    expected |= {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "inference_mode": True}
    assert {key: saved[key] for key in expected} == expected
    assert {name.rpartition(".")[2] for name in saved["target_modules"]} == LINEAR


def test_only_the_layers_asked_for_are_adapted():
    model = lora.attach(random_model("qwen2"), config(target_modules=["q_proj", "down_proj"]), "b")
    assert len(adapter_tensors(model, POLICY)) == 2 * 2 * 2
    whole = lora.attach(random_model("qwen2"), config(target_modules=["layers.1.self_attn.q_proj"]), "b")
    assert len(adapter_tensors(whole, POLICY)) == 2


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["qkv"], r"target_modules=\['qkv'\]: the base model has no such layer\. Its linear layers: .*q_proj"),
        (["q_proj", "qkv"], r"\['qkv'\]: the base model has no such layer"),
        (["embed_tokens"], r"\['embed_tokens'\]: LoRA goes on linear layers only\. .*q_proj"),
        (["embed_tokens", "q_proj", "mlp"], r"\['embed_tokens', 'mlp'\]: LoRA goes on linear layers only"),
    ],
)
def test_targets_that_are_no_linear_layers_are_refused_by_name(targets: list[str], says: str):
    with pytest.raises(ConfigError, match=says):
        lora.attach(random_model("qwen2"), config(target_modules=targets), "b")


def test_an_optimizer_that_would_leave_something_out_is_refused():
    model = lora.attach(random_model("qwen2"), config(), "b")
    optimizer = make_optimizer(model, config().optimizer, 1e-3)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    model.get_base_model().get_input_embeddings().weight.requires_grad = True
    with pytest.raises(AssertionError, match="all of the policy"):
        make_optimizer(model, config().optimizer, 1e-3)


def test_a_delivery_reaches_the_engine_and_leaves_the_policy_alone():
    model = trained()
    policy = Fingerprint.of(adapter_tensors(model, POLICY))
    engine = PlainEngine(model, tokenizer(), ROLLOUT)
    assert policy.difference(engine.fingerprint())
    lora.deliver(model, engine, version=3)
    assert engine.fingerprint() == policy == Fingerprint.of(adapter_tensors(model, POLICY))
    model.set_adapter(POLICY)
    by_policy = logits(model)
    model.set_adapter(ROLLOUT)
    assert torch.equal(logits(model), by_policy)


class Forgetful(PlainEngine):
    """Copies everything, then does to one tensor what its `fault` says."""

    def __init__(self, model: PeftModel, fault) -> None:
        super().__init__(model, tokenizer(), ROLLOUT)
        self.fault = fault

    def load_adapter(self, tensors, version) -> None:
        mine = adapter_tensors(self._model, ROLLOUT)
        before = {name: tensor.clone() for name, tensor in mine.items()}
        super().load_adapter(tensors, version)
        name = sorted(mine)[5]
        self.fault(mine[name], before[name])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda tensor, before: tensor.copy_(before), id="one tensor not copied"),
        pytest.param(lambda tensor, before: tensor[-1].copy_(before[-1]), id="one row not copied"),
        pytest.param(lambda tensor, before: tensor.mul_(2), id="scaled"),
        pytest.param(lambda tensor, before: tensor.copy_(tensor.bfloat16()), id="rounded"),
    ],
)
def test_a_delivery_that_is_not_complete_is_an_error(fault):
    model = trained()
    with pytest.raises(DeliveryError, match=r"version 7: of its 28 adapter tensors, 1 different \(first: .*lora_B"):
        lora.deliver(model, Forgetful(model, fault), version=7)


def test_an_engine_that_keeps_its_old_adapter_is_an_error():
    class Deaf(PlainEngine):
        def load_adapter(self, tensors, version) -> None: ...

    model = trained()
    with pytest.raises(DeliveryError, match="28 different"):
        lora.deliver(model, Deaf(model, tokenizer(), ROLLOUT), version=1)


def test_a_run_continues_from_a_saved_adapter(tmp_path: Path):
    model = trained()
    fresh = lora.attach(random_model("qwen2"), config(seed=9), "some/base")
    lora.continue_from(fresh, write(model, tmp_path), config())
    assert Fingerprint.of(adapter_tensors(fresh, POLICY)) == Fingerprint.of(adapter_tensors(model, POLICY))


def test_an_adapter_that_does_not_fit_is_not_continued(tmp_path: Path):
    write(trained(), tmp_path)
    with pytest.raises(ConfigError, match=r"rank=8.* has 4"):
        lora.continue_from(lora.attach(random_model("qwen2"), config(rank=8), "b"), tmp_path, config(rank=8))
    other = lora.attach(random_model("qwen2"), config(target_modules=["q_proj"]), "b")
    with pytest.raises(ModelError, match="other layers or shapes"):
        lora.continue_from(other, tmp_path, config())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        lora.continue_from(trained(), tmp_path, config())


def test_the_constants_of_the_tiny_models_hold():
    assert len(tokenizer()) == len(WORDS) < random_model("qwen2").config.vocab_size
    assert random_model("llama").config.max_position_embeddings == CONTEXT
