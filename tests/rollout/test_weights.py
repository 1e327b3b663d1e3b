import io
import multiprocessing
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import weights_reader
from peft import LoraConfig, PeftModel, get_peft_model
from reference_attention import reference_logits
from tiny_models import ALL_FAMILIES, random_model
from torch import Tensor

from rewardsmith.errors import DeliveryError, ModelError
from rewardsmith.rollout.adapter import adapter_tensors
from rewardsmith.rollout.model import delivery
from rewardsmith.rollout.model.architecture import describe
from rewardsmith.rollout.model.weights import Weights

IDS = [3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 4, 5, 9, 20, 28, 2]
TESTS = Path(__file__).parents[1]


def policy(family: str, dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    """A model with an adapter that says something."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(random_model(family).to(dtype), LoraConfig(**settings), adapter_name="policy").eval()
    torch.manual_seed(1)
    for tensor in adapter_tensors(model, "policy").values():
        tensor.normal_(std=0.2)
    return model


def fused(model: PeftModel, merge: bool | None = None) -> Weights:
    weights = Weights.fuse(model, describe(model))
    weights.bind(adapter_tensors(model, "policy"), 2.0, merge)
    return weights


def deliver(model: PeftModel, weights: Weights) -> None:
    for name, tensor in weights.adapter().items():
        tensor.copy_(adapter_tensors(model, "policy")[name])
    weights.merge()


def theirs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_with_an_adapter_merged_or_not_the_logits_are_pefts(family: str):
    model = policy(family)
    merged, beside = fused(model), fused(model, merge=False)
    with model.disable_adapter():
        base = theirs(model)
    for weights in (merged, beside):
        # Bound, but not delivered yet: the adapter is zero.
        assert (reference_logits(weights, IDS) - base).abs().max() < 1e-5
        deliver(model, weights)
    assert (merged.merged, beside.merged) == (True, False)
    assert (theirs(model) - base).abs().max() > 0.1
    assert (reference_logits(merged, IDS) - theirs(model)).abs().max() < 1e-5
    torch.testing.assert_close(reference_logits(merged, IDS), reference_logits(beside, IDS), rtol=0, atol=1e-12)
    before = reference_logits(beside, IDS)
    beside.merge()  # has nothing to rebuild
    assert all(projection.merged_OI is None for projection in beside.projections)
    assert torch.equal(reference_logits(beside, IDS), before)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["up_proj", "k_proj"]])
def test_an_adapter_on_some_layers_only(targets: list[str]):
    model = policy("qwen2", target_modules=targets)
    for merge in (True, False):
        weights = fused(model, merge)
        deliver(model, weights)
        assert (reference_logits(weights, IDS) - theirs(model)).abs().max() < 1e-5
        assert weights.bound_modules == 2 * len(targets)
        copies = [projection for projection in weights.projections if projection.merged_OI is not None]
        assert len(copies) == (sum(bool(projection.bound) for projection in weights.projections) if merge else 0)
        assert weights.adapter().keys() == adapter_tensors(model, "policy").keys()


def test_the_adapter_of_phi_spans_its_fused_layers():
    weights = fused(policy("phi3"))
    parts = weights.layers[1].qkv.parts
    assert [(part.name, part.start, part.stop) for part in parts] == [("model.layers.1.self_attn.qkv_proj", 0, 64)]
    assert weights.bound_modules == 8


def test_fusing_takes_no_memory_of_its_own_and_the_plain_path_stays_as_it_was():
    model = policy("qwen2", torch.float32)
    before, saved = theirs(model), saved_bytes(model)
    weights = fused(model)
    base = model.get_base_model()
    for index, layer in enumerate(weights.layers):
        for projection in layer.projections:
            for part in projection.parts:
                own = base.get_submodule(part.name).base_layer.weight
                assert own.data_ptr() == projection.base_OI[part.start].data_ptr(), (index, part.name)
                assert own.untyped_storage().data_ptr() == projection.base_OI.untyped_storage().data_ptr()
    assert weights.embed_VH.data_ptr() == weights.head_VH.data_ptr() == base.lm_head.weight.data_ptr()
    assert torch.equal(theirs(model), before)
    assert saved_bytes(model) == saved
    # A PEFT adapter can still be loaded into the model whose weights are views now.
    deliver(model, weights)
    for tensor in adapter_tensors(model, "policy").values():
        tensor.mul_(2.0)
    changed = theirs(model)
    assert not torch.equal(changed, before)
    deliver(model, weights)
    assert (reference_logits(weights, IDS) - changed).abs().max() < 1e-4


def saved_bytes(model: PeftModel) -> bytes:
    file = io.BytesIO()
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)
    return file.getvalue()


def test_saving_the_base_after_fusing_gives_the_same_model(tmp_path: Path):
    model = random_model("qwen2")
    before = theirs(model)
    Weights.fuse(model, describe(model))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(theirs(again), before)


def test_in_16_bits_a_first_step_is_lost_by_merging_and_so_merging_is_not_the_default():
    """AdamW's first step at 1e-5 makes every number of B about 1e-5; bfloat16 keeps 8 bits of a weight."""
    model = policy("llama", torch.bfloat16)
    for name, tensor in adapter_tensors(model, "policy").items():
        if "lora_B" in name:
            tensor.copy_(1e-5 * tensor.sign())
    merged, beside = fused(model, merge=True), fused(model)
    for weights in (merged, beside):
        deliver(model, weights)
    assert not beside.merged
    lost = [(p.merged_OI == p.base_OI).double().mean() for p in merged.projections if p.merged_OI is not None]
    assert torch.stack(lost).mean() > 0.98
    # Beside the weights the same adapter reaches the output, as in PEFT, whose adapters are float32 too.
    projection = beside.layers[0].out
    assert projection.parts[0].a_RI is not None and projection.parts[0].a_RI.dtype == torch.float32
    x_NI = torch.randn(50, projection.base_OI.shape[1]).bfloat16()
    zero_NO = torch.zeros(50, len(projection.base_OI), dtype=torch.bfloat16)
    assert (projection.add_low_rank(x_NI, zero_NO) != 0).all()
    y_NO = x_NI @ projection.base_OI.T
    linear = model.get_base_model().model.layers[0].self_attn.o_proj
    assert torch.equal(projection.add_low_rank(x_NI, y_NO), linear(x_NI).detach())


def test_parts_of_a_merge_add_up_to_the_whole():
    model = policy("gemma3")
    whole, shared_out = fused(model), fused(model)
    deliver(model, whole)
    for name, tensor in shared_out.adapter().items():
        tensor.copy_(whole.adapter()[name])
    for shard in (2, 0, 1):
        with pytest.raises(DeliveryError, match="never merged"):
            shared_out.verify(0)
        shared_out.merge(shard, 3)
    shared_out.verify(0)
    for one, other in zip(whole.projections, shared_out.projections, strict=True):
        assert torch.equal(one.weight_OI, other.weight_OI)


def test_another_process_reads_the_same_memory_and_needs_no_transformers():
    model = policy("gemma3", torch.float32)
    weights = fused(model)
    before = theirs(model)
    weights.share()
    assert torch.equal(theirs(model), before)  # it reads the shared memory now
    base = model.get_base_model()
    for projection in weights.projections:
        for part in projection.parts:
            own = base.get_submodule(part.name).base_layer.weight
            assert own.data_ptr() == projection.base_OI[part.start].data_ptr()
    ours, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=weights_reader.serve, args=(other,))
    process.start()
    try:
        ask(ours, (weights, IDS), answer=False)
        assert ask(ours, "modules") == []
        zero = ask(ours, "logits")
        deliver_shared_out(model, weights, ours)
        weights.verify(3)
        merged = ask(ours, "logits")
        ours.send(None)
        process.join(20)
        assert process.exitcode == 0
    finally:
        process.kill()
    with model.disable_adapter():
        assert (torch.tensor(zero) - theirs(model)).abs().max() < 1e-4
    assert torch.equal(torch.tensor(merged), reference_logits(weights, IDS))
    assert (torch.tensor(merged) - theirs(model)).abs().max() < 1e-4


def ask(connection: Any, order: object, answer: bool = True) -> Any:
    connection.send(order)
    if not answer:
        return None
    assert connection.poll(60)
    return connection.recv()


def deliver_shared_out(model: PeftModel, weights: Weights, connection: Any) -> None:
    """This process merges the even projections, the other one the odd ones."""
    for name, tensor in weights.adapter().items():
        tensor.copy_(adapter_tensors(model, "policy")[name])
    weights.merge(0, 2)
    ask(connection, "merge")


def test_sharing_opens_few_files():
    """A process may have 1024 open by default; small tensors share one each type."""
    weights = fused(policy("qwen3", torch.float32))
    weights.share()
    assert weights.embed_VH.is_shared() and weights.norm.is_shared()
    tensors = [weights.norm, *weights.adapter().values()]
    for layer in weights.layers:
        tensors += [layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm]
        tensors += [projection.row_checks_O for projection in layer.projections]
        tensors += [part.merged_from for projection in layer.projections for part in projection.parts]
    assert all(tensor.is_shared() for tensor in tensors)
    # Norms, row checks, adapter, samples of it.
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 4


def test_too_little_shared_memory_is_said_in_plain_words():
    weights = fused(policy("llama", torch.float32))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(
            ModelError, match="shared memory has no room for the model's weights; in a container, raise"
        ):
            weights.share()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_row_checks_are_bits_times_powers_of_an_odd_number():
    for dtype, whole in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)):
        weight_OI = torch.randn(5, 7).to(dtype)
        bits = weight_OI.view(whole).tolist()
        expected = [sum(bit * delivery.ODD ** (place + 1) for place, bit in enumerate(row)) for row in bits]
        wrapped = [(number + 2**63) % 2**64 - 2**63 for number in expected]
        assert delivery.row_checks(weight_OI).tolist() == wrapped


def test_row_checks_see_any_one_number_change_and_rows_change_sign(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(delivery, "CHUNK", 24)  # three rows at a time
    weight_OI = torch.randn(10, 8)
    before = delivery.row_checks(weight_OI)
    for row in range(10):
        weight_OI[row, row % 8] = torch.nextafter(weight_OI[row, row % 8], torch.tensor(9.0))
        assert (delivery.row_checks(weight_OI) != before).nonzero().flatten().tolist() == list(range(row + 1))
    assert (delivery.row_checks(-weight_OI) != delivery.row_checks(weight_OI)).all()


def test_row_checks_of_a_large_matrix_take_little_memory():
    """In a process of its own, whose peak is not that of other tests. All at once it would be 16 bytes a number."""
    code = (
        "import resource, torch\n"
        "from rewardsmith.rollout.model.delivery import row_checks\n"
        "torch.set_num_threads(1)\n"
        "weight = torch.ones(2048, 8192, dtype=torch.bfloat16)\n"  # 32 MiB; 128 MiB as int64
        "row_checks(weight[:64])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "row_checks(weight)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert int(grown) * 1024 < 32 * 2**20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 32)},
            "lm_head do not belong together",
        ),
        (
            lambda t: t | {f"base_model.model.lm_head.lora_{x}.weight": torch.zeros(3, 3) for x in "AB"},
            "on lm_head, which is no linear layer",
        ),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(3, 32)}, "no part of plain LoRA"),
        (lambda t: dict(list(t.items())[1:]), "do not belong together"),
        (lambda t: {n: x[:, :-1] if "lora_A" in n else x for n, x in t.items()}, "down_proj, which is 32 x 48"),
    ],
)
def test_an_adapter_that_fits_nowhere_is_refused(change: Any, words: str):
    model = policy("llama")
    weights = Weights.fuse(model, describe(model))
    with pytest.raises(DeliveryError, match=words):
        weights.bind(change(adapter_tensors(model, "policy")), 2.0)


def test_binding_again_forgets_the_adapter_before():
    model = policy("llama")
    weights = fused(model)
    deliver(model, weights)
    some = {name: tensor for name, tensor in adapter_tensors(model, "policy").items() if "o_proj" in name}
    weights.bind(some, 3.0)
    with model.disable_adapter():
        assert (reference_logits(weights, IDS) - theirs(model)).abs().max() < 1e-5
    assert weights.adapter().keys() == some.keys()
    assert weights.scaling == 3.0 and {projection.scaling for projection in weights.projections} == {3.0}
