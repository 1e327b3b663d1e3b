"""The head fused with the loss against autograd on whole logits."""

from dataclasses import replace

import pytest
import torch
from fused_models import VOCAB, batch, old_logps, policy
from tiny_models import PADDED_VOCAB
from torch.utils._python_dispatch import TorchDispatchMode

from rewardsmith.train.batch import token_batch
from rewardsmith.train.fast import head as head_module
from rewardsmith.train.fast.head import Head
from rewardsmith.train.fast.packed import pack
from rewardsmith.train.losses import LossSettings, token_losses


def obvious(weights, h_PH, made, temperature, vocab, cap):
    logits_NV = h_PH[made.source_N] @ weights.head_VH.T
    if cap:
        logits_NV = cap * (logits_NV / cap).tanh()
    logits_NV = logits_NV[:, :vocab] / temperature
    if made.support is not None:
        for n in range(len(logits_NV)):
            ids = made.support.ids[made.support.offsets[n] : made.support.offsets[n + 1]].tolist()
            others = [i for i in range(vocab) if i not in ids]
            logits_NV[n, others] = -torch.inf
    return logits_NV.log_softmax(-1).gather(1, made.targets_N[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [VOCAB, PADDED_VOCAB])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_loss_log_probs_and_gradient(temperature, vocab, cap, support, chunk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head_module, "FEWEST_ROWS", chunk)
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", 1)
    _, weights = policy("llama")
    weights = replace(weights, architecture=replace(weights.architecture, logit_softcap=cap))
    examples = batch(support=support)
    made = pack(examples, range(len(examples)))
    h_PH = torch.randn(len(made.predicting_P), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h_PH.requires_grad_()
    logps_N = obvious(weights, h_PH, made, temperature, vocab, cap)
    for settings, old in ((LossSettings(), None), (LossSettings("gspo"), old_logps(examples))):
        tokens = token_batch(examples, old)
        losses = token_losses(logps_N, tokens, settings)
        loss = (losses.losses_N * tokens.weights_N).sum()
        (expected_PH,) = torch.autograd.grad(loss, h_PH, retain_graph=True)
        with torch.no_grad():
            found, d_PH = Head(weights, temperature, vocab).gradient(h_PH.detach(), made, tokens, settings)
        assert torch.allclose(found.logps_N, logps_N, atol=1e-12, rtol=0)
        assert torch.allclose(d_PH, expected_PH, atol=1e-12, rtol=0)
        assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
        assert int(found.clipped_low) == int(losses.clipped_low_N.sum())
        assert int(found.clipped_high) == int(losses.clipped_high_N.sum())
        assert found.kl is None


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_logits_never_exist_for_all_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head_module, "FEWEST_ROWS", 4)
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", 1)
    _, weights = policy()
    weights = replace(weights, head_VH=torch.randn(5000, 32, dtype=torch.float64))
    examples = batch()
    made = pack(examples, range(len(examples)))
    h_PH = torch.randn(len(made.predicting_P), 32, dtype=torch.float64)
    with torch.no_grad(), Largest() as largest:
        Head(weights, 0.9, 5000).gradient(h_PH, made, token_batch(examples), LossSettings())
    assert largest.numbers == 5000 * 32  # a slice of the head itself; logits of all targets would be 90 x 5000


def test_bfloat16_logits_are_normalised_in_float32():
    _, weights = policy("llama")
    narrow = replace(weights, head_VH=weights.head_VH.bfloat16())
    made = pack(batch(), range(3))
    h_PH = torch.randn(len(made.predicting_P), 32).bfloat16()
    with torch.no_grad():
        logps_N = Head(narrow, 1.0, VOCAB).logps(h_PH, made)
    expected = (h_PH[made.source_N] @ narrow.head_VH[:VOCAB].T).float().log_softmax(-1)
    assert logps_N.dtype == torch.float32
    assert torch.allclose(logps_N, expected.gather(1, made.targets_N[:, None]).squeeze(1), atol=1e-5)


def test_in_16_bits_what_many_tokens_give_one_row_is_added_up_unrounded(monkeypatch: pytest.MonkeyPatch):
    """The last row of a prompt predicts the first token of each completion; here each is a chunk by itself."""
    monkeypatch.setattr(head_module, "FEWEST_ROWS", 1)
    monkeypatch.setitem(head_module.CHUNK_LOGITS, "cpu", 1)
    _, weights = policy("llama", torch.bfloat16)
    examples = batch([([5, 6, 7], (1,) * 600)])
    made, tokens = pack(examples, range(len(examples))), token_batch(examples)
    h_PH = torch.randn(1, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        _, found = Head(weights, 0.9, VOCAB).gradient(h_PH, made, tokens, LossSettings())
        wide = replace(weights, head_VH=weights.head_VH.double())
        _, exact = Head(wide, 0.9, VOCAB).gradient(h_PH.double(), made, tokens, LossSettings())
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.01
