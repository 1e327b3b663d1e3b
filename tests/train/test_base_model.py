from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, random_model, save_model, tokenizer
from transformers import BloomConfig, BloomForCausalLM

from rewardsmith.errors import ModelError
from rewardsmith.train.model import load_base

SHARED_MODEL = Path(__file__).parents[3] / "shared" / "data" / "models" / "babyllama361"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_to_the_same_frozen_weights(family: str, tmp_path: Path):
    model, words = load_base(str(save_model(tmp_path, family)))
    expected = random_model(family).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    assert len(words) == len(tokenizer())
    assert words("a b")["input_ids"] == tokenizer()("a b")["input_ids"] == [2, 28, 3]


def test_weights_in_pickle_files_are_refused(tmp_path: Path):
    save_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save(random_model("qwen2").state_dict(), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"no weights in safetensors.*pytorch_model\.bin.*not loaded"):
        load_base(str(tmp_path))


def test_damaged_weights_and_missing_folders_say_so(tmp_path: Path):
    save_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(tmp_path))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(tmp_path / "nothing"))


def test_code_of_a_model_is_not_run(tmp_path: Path):
    save_model(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace(
            '"model_type": "qwen2"',
            '"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}',
        )
    )
    with pytest.raises(ModelError, match="code of its own"):
        load_base(str(tmp_path))
    assert not marker.exists()


def test_an_architecture_without_positions_is_refused_by_name(tmp_path: Path):
    BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"BloomForCausalLM.*position_ids"):
        load_base(str(tmp_path))


@pytest.mark.skipif(not SHARED_MODEL.is_dir(), reason="the shared model babyllama361 is not beside this checkout")
def test_a_real_small_llama_loads_and_speaks():
    from peft import LoraConfig, get_peft_model

    from rewardsmith.config import SamplingParamsConfig
    from rewardsmith.rollout.plain import PlainEngine
    from rewardsmith.rollout.prompts import make_prompts

    model, words = load_base(str(SHARED_MODEL))
    (prompt,), _ = make_prompts(
        [(0, {"prompt": "Once upon a time"})], words, apply_chat_template=False, max_tokens=None
    )
    assert prompt.ids[0] == words.bos_token_id and words.eos_token_id not in prompt.ids[1:]
    engine = PlainEngine(get_peft_model(model, LoraConfig(target_modules="all-linear"), adapter_name="rollout"), words)
    ((_, group),) = engine.generate([prompt.ids], 4, SamplingParamsConfig(max_tokens=60, temperature=0.3), [1, 2, 3, 4])
    for completion in group:
        assert completion.text[:1] in " ,." and "the" in completion.text
        assert sum(completion.logps) / len(completion.logps) > -2
