"""Every family against transformers' own logits. In float64 transformers rounds norms and angles to float32 inside."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference_attention import reference_attend, reference_logits
from test_architecture import multimodal_gemma
from tiny_models import ALL_FAMILIES, PADDED_VOCAB, perturb, random_model
from torch import Tensor

from rewardsmith.rollout.model.architecture import describe
from rewardsmith.rollout.model.layers import PlainOps, logits, run
from rewardsmith.rollout.model.weights import Weights

IDS = [3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 4, 5, 9, 20, 28, 2, 17, 17, 30, 12]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [3.0, 9.0],
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ALL_FAMILIES),
    ("qwen2", WINDOWS),
    ("qwen2", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 4}),
    ("qwen3", WINDOWS | {"attention_bias": True}),
    ("mistral", {"sliding_window": None, "head_dim": None}),
    ("gemma2", {"attention_bias": True, "num_hidden_layers": 4, "attn_logit_softcapping": None}),
    ("gemma3", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "attention_bias": True}),
    ("gemma3", {"layer_types": None, "num_hidden_layers": 7}),
    ("phi3", {"sliding_window": 5, "num_key_value_heads": 1}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
]


def theirs(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def named(variant: tuple[str, dict[str, Any]]) -> str:
    return "-".join([variant[0], *variant[1]])


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-5), (torch.float32, 1e-4)], ids=["f64", "f32"])
def test_logits_are_those_of_transformers(variant: tuple[str, dict[str, Any]], dtype: torch.dtype, within: float):
    model = random_model(variant[0], **variant[1])
    perturb(model)
    model = model.to(dtype)
    before = theirs(model, IDS)
    weights = Weights.fuse(model, describe(model))
    assert before.std() > 0.5
    assert (reference_logits(weights, IDS) - before).abs().max() < within
    assert torch.equal(theirs(model, IDS), before)  # the plain path is as it was


def test_the_language_model_inside_a_multimodal_one():
    model = multimodal_gemma()
    perturb(model)
    before = theirs(model, IDS)
    weights = Weights.fuse(model, describe(model))
    assert (reference_logits(weights, IDS) - before).abs().max() < 1e-4


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_in_16_bits_norms_gates_and_embeddings_are_rounded_as_in_transformers(family: str):
    model = random_model(family).bfloat16()
    weights = Weights.fuse(model, describe(model))
    one = IDS[:1]  # attention of a single token is its value, however it is computed
    assert torch.equal(reference_logits(weights, one), theirs(model, one))


CHANGED = {
    "gemma2": {
        "attention_softcap": None,
        "logit_softcap": None,
        "attention_scale": 16**-0.5,
        "embed_scale": 1.0,
        "gate": "silu",
        "norm_epsilon": 1e-2,
    },
    "gemma3": {"attention_scale": 16**-0.5},
    "qwen3": {"norm_epsilon": 1e-2},
}


@pytest.mark.parametrize(("family", "field"), [(family, field) for family in CHANGED for field in CHANGED[family]])
def test_each_number_matters_in_these_models(family: str, field: str):
    """So that the agreement above says something about it."""
    model = random_model(family)
    weights = Weights.fuse(model, describe(model))
    right = reference_logits(weights, IDS)
    weights.architecture = replace(weights.architecture, **{field: CHANGED[family][field]})
    assert (reference_logits(weights, IDS) - right).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "phi3", "llama"])
@pytest.mark.parametrize("change", ["window", "rope"])
def test_each_layers_window_and_positions_matter_in_these_models(family: str, change: str):
    model = random_model(family)
    weights = Weights.fuse(model, describe(model))
    right, layers = reference_logits(weights, IDS), weights.architecture.layers
    for index, kind in enumerate(layers):
        if change == "window":
            other = replace(kind, window=len(IDS) - 4 if kind.window is None else None)
        else:
            other = replace(kind, rope=replace(kind.rope, inv_freq_F=kind.rope.inv_freq_F * 0.9))
        changed = (*layers[:index], other, *layers[index + 1 :])
        weights.architecture = replace(weights.architecture, layers=changed)
        assert (reference_logits(weights, IDS) - right).abs().max() > 1e-2


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_rows_that_are_wanted_are_those_of_the_whole(family: str):
    model = random_model(family).double()
    weights = Weights.fuse(model, describe(model))
    attend = reference_attend(weights.architecture, torch.arange(len(IDS)))
    rows = torch.tensor([19, 4, 4])
    with torch.no_grad():
        whole = run(weights, torch.tensor(IDS), attend, PlainOps())
        some = run(weights, torch.tensor(IDS), attend, PlainOps(), last_rows=rows)
    torch.testing.assert_close(some, whole[rows], rtol=0, atol=1e-12)


def test_rows_of_several_sequences_do_not_see_each_other():
    model = random_model("gemma2").double()
    weights = Weights.fuse(model, describe(model))
    first, second = IDS[:11], IDS[5:]
    positions_N = torch.cat([torch.arange(len(first)), torch.arange(len(second))])
    sequence_N = torch.tensor([0] * len(first) + [1] * len(second))
    attend = reference_attend(weights.architecture, positions_N, sequence_N[:, None] == sequence_N[None, :])
    with torch.no_grad():
        h_NH = run(weights, torch.tensor(first + second), attend, PlainOps())
    alone = [reference_logits(weights, ids) for ids in (first, second)]
    torch.testing.assert_close(logits(weights, h_NH, PADDED_VOCAB), torch.cat(alone), rtol=0, atol=1e-12)


def test_logits_are_over_the_tokenizers_ids_only():
    model = random_model("gemma2")
    weights = Weights.fuse(model, describe(model))
    assert torch.equal(reference_logits(weights, IDS, 29), reference_logits(weights, IDS)[:, :29])
