import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import ALL_FAMILIES, CONTEXT, WINDOW, random_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, MixtralConfig, MixtralForCausalLM, PhiConfig
from transformers import PhiForCausalLM as OldPhi

from rewardsmith.rollout.model.architecture import Unsupported, describe


def with_adapter(model: Any, **settings: Any) -> Any:
    settings = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(model, LoraConfig(**settings))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_an_architecture_is_numbers_only_and_can_be_sent_to_another_process(family: str):
    architecture = describe(random_model(family))
    again = pickle.loads(pickle.dumps(architecture))
    assert (again.family, again.hidden, again.heads, again.kv_heads) == (family, 32, 4, 2)
    assert [kind.window for kind in again.layers] == [kind.window for kind in architecture.layers]
    assert torch.equal(again.layers[0].rope.inv_freq_F, architecture.layers[0].rope.inv_freq_F)
    assert b"transformers" not in pickle.dumps(architecture)


def test_what_is_peculiar_to_gemma():
    two, three = describe(random_model("gemma2")), describe(random_model("gemma3"))
    assert (two.attention_softcap, two.logit_softcap, three.attention_softcap, three.logit_softcap) == (
        1.5,
        2.5,
        *2 * [None],
    )
    for architecture in (two, three):
        assert [kind.window for kind in architecture.layers] == [WINDOW, None]
        assert architecture.attention_scale == 24**-0.5
        assert architecture.norm_offset == 1.0
        assert architecture.gate == "gelu_tanh"
    assert two.embed_scale == float(torch.tensor(32**0.5))
    assert describe(random_model("gemma2").bfloat16()).embed_scale == float(torch.tensor(32**0.5, dtype=torch.bfloat16))
    near, far = (kind.rope.inv_freq_F for kind in three.layers)
    places = torch.arange(0, 16, 2) / 16
    torch.testing.assert_close(near, 50.0**-places)
    torch.testing.assert_close(far, 1000.0**-places / 8)


def test_mistral_and_phi_have_their_window_in_every_layer():
    assert [kind.window for kind in describe(random_model("mistral", num_hidden_layers=3)).layers] == [WINDOW] * 3
    assert [kind.window for kind in describe(random_model("phi3", sliding_window=7)).layers] == [7, 7]
    assert [kind.window for kind in describe(random_model("mistral", sliding_window=None)).layers] == [None, None]


def test_qwen_has_a_window_only_where_its_config_turns_it_on():
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3}
    assert [kind.window for kind in describe(random_model("qwen2", **windows)).layers] == [None, 5, 5]
    assert [kind.window for kind in describe(random_model("qwen3", sliding_window=5)).layers] == [None, None]


def test_phi_turns_a_part_of_each_head():
    architecture = describe(random_model("phi3"))
    assert (architecture.head_dim, architecture.layers[0].rope.inv_freq_F.numel()) == (8, 2)


def test_longrope_holds_within_the_first_context_only_and_a_long_sequence_before_changes_nothing():
    model = random_model(
        "phi3",
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.5],
            "long_factor": [3.0, 9.0],
        },
    )
    before = describe(model)
    model(torch.ones(1, 20, dtype=torch.long))  # transformers now has the long factors in its buffer
    after = describe(model)
    assert before.context == after.context == 16 < CONTEXT
    torch.testing.assert_close(after.layers[0].rope.inv_freq_F, torch.tensor([1.0, 10000.0**-0.5 / 1.5]))
    # The scaling is that of the whole stretch, 64 / 16: Ding et al. 2024, arXiv:2402.13753.
    assert before.layers[0].rope.scaling == pytest.approx(
        (1 + torch.tensor(4.0).log() / torch.tensor(16.0).log()) ** 0.5
    )


def test_the_language_model_of_the_multimodal_gemma_is_described():
    assert describe(multimodal_gemma()).path == "model.language_model"
    assert describe(multimodal_gemma()).logit_softcap is None  # transformers' class does not apply it


def multimodal_gemma() -> Gemma3ForConditionalGeneration:
    text = random_model("gemma3", final_logit_softcapping=3.0).config.to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def expect_refusal(model: Any, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        describe(model)


def test_other_architectures_are_refused():
    experts = MixtralConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    expect_refusal(MixtralForCausalLM(experts), "MixtralForCausalLM is a mixture of experts; known exactly are Gemma2")
    old = PhiConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    expect_refusal(OldPhi(old), "PhiForCausalLM is not among them")

    class Changed(type(random_model("llama"))):  # type: ignore[misc]
        pass

    expect_refusal(Changed(random_model("llama").config), "Changed is not among them")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"hidden_act": "relu"}, "its activation is 'relu'"),
        ("llama", {"sliding_window": 4}, "sliding window"),
        ("gemma2", {"use_bidirectional_attention": True}, "attend to later"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions are of type 'dynamic'",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layers of type 'chunked_attention'",
        ),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "with a window of None"),
    ],
)
def test_what_is_not_computed_exactly_is_refused(family: str, changes: dict[str, Any], words: str):
    expect_refusal(random_model(family, **changes), words)


def test_weights_of_other_kinds_are_refused():
    model = random_model("llama")
    model.model.norm.double()
    expect_refusal(model, r"not all of one type on one device: torch.float32 on cpu, torch.float64 on cpu")

    model = random_model("llama")
    model.config.quantization_config = {"quant_method": "awq"}
    expect_refusal(model, "quantised")

    class Packed(torch.nn.Linear):
        pass

    model = random_model("llama")
    model.model.layers[1].mlp.up_proj = Packed(32, 48, bias=False)
    expect_refusal(model, r"model.layers.1.mlp.up_proj is no plain linear layer but a Packed")

    model = random_model("llama")
    model.model.layers[0].self_attn.q_norm = torch.nn.RMSNorm(8)
    expect_refusal(model, "weights that are not known: model.layers.0.self_attn.q_norm.weight")

    model = random_model("llama")
    model.lm_head = torch.nn.Linear(32, 40)
    expect_refusal(model, "not known: lm_head.bias")

    with torch.device("meta"):
        expect_refusal(type(model)(model.config), "not in memory")


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "an adapter is on lm_head, which is no linear layer of the decoder",
        ),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "an adapter is on model.embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "not known: lm_head"),
        ({"use_dora": True}, "no plain LoRA"),
        ({"lora_bias": True}, "no plain LoRA"),
        ({"lora_dropout": 0.1}, "lora_dropout is on"),
    ],
)
def test_adapters_that_the_fast_path_would_not_apply_are_refused(settings: dict[str, Any], words: str):
    expect_refusal(with_adapter(random_model("llama"), **settings), words)


def test_an_adapter_merged_in_place_is_refused_since_its_base_is_not_the_base():
    model = with_adapter(random_model("llama"))
    assert describe(model).family == "llama"
    model.merge_adapter()
    expect_refusal(model, "an adapter is merged into model.layers.0")


def test_an_adapter_on_the_vision_tower_is_refused():
    model = with_adapter(multimodal_gemma(), target_modules=["q_proj"])
    expect_refusal(model, r"an adapter is on model\.vision_tower.*no linear layer of the decoder")
