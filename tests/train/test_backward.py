"""Each operation against torch's autograd on the plain one, and what a layer keeps for its backward pass."""

from dataclasses import replace

import pytest
import torch
from fused_models import batch, policy
from tiny_models import ALL_FAMILIES

from rewardsmith.rollout.model.layers import PlainOps, run
from rewardsmith.train.fast.attention import PackedAttention
from rewardsmith.train.fast.backward import AdapterGradient, BaseOps, TrainedOps
from rewardsmith.train.fast.memory import bytes_per_row
from rewardsmith.train.fast.packed import pack


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.fixture
def ops() -> TrainedOps:
    return TrainedOps(AdapterGradient(policy()[1]))


def test_norm(ops: TrainedOps):
    x, weight, d = rows(7, 3, 8), rows(8, seed=1).detach(), rows(7, 3, 8, seed=2).detach()
    ours, plain = (o.norm(x, weight, 1e-2) for o in (ops, PlainOps()))
    assert torch.allclose(ours, plain, atol=1e-13)
    assert torch.allclose(*(torch.autograd.grad(y, x, d)[0] for y in (ours, plain)), atol=1e-13)


def test_add_norm_with_and_without_a_use_of_the_sum(ops: TrainedOps):
    x, more, weight = rows(7, 8), rows(7, 8, seed=1), rows(8, seed=2).detach()
    d_sum, d_norm = rows(7, 8, seed=3).detach(), rows(7, 8, seed=4).detach()
    for grads in ((d_sum, d_norm), (None, d_norm), (d_sum, None)):
        found = []
        for o in (ops, PlainOps()):
            outs = [(y, d) for y, d in zip(o.add_norm(x, more, weight, 1e-2), grads, strict=True) if d is not None]
            found.append(torch.autograd.grad([y for y, _ in outs], [x, more], [d for _, d in outs]))
        assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gate(ops: TrainedOps, kind: str):
    x, d = rows(7, 16), rows(7, 8, seed=1).detach()
    ours, plain = (o.gate(x, kind) for o in (ops, PlainOps()))
    assert torch.allclose(ours, plain, atol=1e-13)
    assert torch.allclose(*(torch.autograd.grad(y, x, d)[0] for y in (ours, plain)), atol=1e-13)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["k_proj"]])
def test_linear_adds_up_the_adapters_gradient(merge: bool, targets: list[str] | None):
    _, weights = policy(merge=merge, target_modules=targets)
    _, separate = policy(merge=False, target_modules=targets)
    total = AdapterGradient(weights)
    projection, plain = weights.layers[1].qkv, separate.layers[1].qkv
    leaves = [t.requires_grad_() for part in plain.bound for t in (part.a_RI, part.b_OR)]
    expected = [torch.zeros_like(leaf) for leaf in leaves]
    for seed in (0, 5):  # two micro-batches
        x, d = rows(9, 32, seed=seed), rows(9, 64, seed=seed + 1).detach()
        dx, *d_leaves = torch.autograd.grad(PlainOps().linear(x, plain), [x, *leaves], d)
        ours = TrainedOps(total).linear(x, projection)
        assert torch.allclose(torch.autograd.grad(ours, x, d)[0], dx, atol=1e-12)
        expected = [a + b for a, b in zip(expected, d_leaves, strict=True)]
    gradients = {name: torch.ones_like(tensor) for name, tensor in weights.adapter().items()}
    total.add_to(gradients)
    found = [1 + gradients[name] * 0 for name in gradients]  # of all other layers: what was there
    for part, (a, b) in zip(projection.bound, zip(expected[::2], expected[1::2], strict=True), strict=True):
        for kind, d in (("A", a), ("B", b)):
            ours = gradients.pop(f"base_model.model.{part.name}.lora_{kind}.weight")
            assert torch.allclose(ours, 1 + d, atol=1e-12)
    assert found and all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in gradients.values())


def test_no_gradient_of_what_stands_before_the_first_adapter():
    """The embeddings' is never computed: autograd starts at the first layer with an adapter."""
    _, weights = policy(target_modules=["o_proj"])
    ops = TrainedOps(AdapterGradient(weights))
    x = rows(3, 32).detach()
    assert not ops.linear(ops.norm(x, weights.norm, 1e-6), weights.layers[0].qkv).requires_grad
    assert ops.linear(x, weights.layers[0].out).requires_grad


def test_the_base_is_computed_without_the_adapter():
    _, weights = policy()
    projection, x = weights.layers[0].gate_up, rows(3, 32).detach()
    assert torch.equal(BaseOps().linear(x, projection), x @ projection.base_OI.T)
    assert not torch.allclose(
        BaseOps().linear(x, projection), TrainedOps(AdapterGradient(weights)).linear(x, projection)
    )


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_a_row_keeps_is_what_the_budget_counts(family: str):
    """Saved storages counted once, over a batch large enough for a token's share to show."""
    _, weights = policy(family)
    examples = batch([([1, 2, 3], (40, 40, 40, 40))])
    made = pack(examples, range(len(examples)))
    shape = weights.architecture
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        h = run(weights, made.ids_R, PackedAttention(shape, made, torch.float64), TrainedOps(AdapterGradient(weights)))
    norms = [
        weights.norm,
        *(t for layer in weights.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)),
    ]
    of_weights = {norm.untyped_storage().data_ptr() for norm in norms}
    per_row = sum(size for place, size in kept.items() if place not in of_weights) / len(made.ids_R)
    of_one_layer = bytes_per_row(weights) - bytes_per_row(replace(weights, layers=weights.layers[:1]))
    counted = of_one_layer * len(weights.layers)
    assert h.requires_grad
    assert 0.9 * per_row < counted < 1.2 * per_row


@pytest.mark.parametrize("merge", [True, False])
def test_in_16_bits_the_adapters_products_are_those_of_its_own_precision(merge: bool):
    _, weights = policy(dtype=torch.bfloat16, merge=merge)
    total, projection = AdapterGradient(weights), weights.layers[1].qkv
    x, d = (rows(300, size, seed=seed).detach().bfloat16() for seed, size in ((0, 32), (1, 64)))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(TrainedOps(total).linear(leaf, projection), leaf, d)
    gradients = {name: torch.zeros_like(tensor) for name, tensor in weights.adapter().items()}
    total.add_to(gradients)
    exact_dx = d.double() @ projection.weight_OI.double()
    for part in projection.bound:
        a, b, d_part = part.a_RI.double(), part.b_OR.double(), d[:, part.start : part.stop].double()
        if not merge:
            exact_dx += projection.scaling * d_part @ b @ a
        exact = {"A": (d_part @ b).T @ x.double(), "B": d_part.T @ (x.double() @ a.T)}
        for kind, by_hand in exact.items():
            found = gradients[f"base_model.model.{part.name}.lora_{kind}.weight"]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), projection.scaling * by_hand, rtol=1e-5, atol=1e-4)
    assert float((dx.double() - exact_dx).norm() / exact_dx.norm()) < 0.005
