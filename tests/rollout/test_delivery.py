"""Each way to run something else than the delivered policy, after an update as small as they get."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import random_model

from rewardsmith.errors import DeliveryError
from rewardsmith.rollout.adapter import Fingerprint
from rewardsmith.rollout.model.architecture import describe
from rewardsmith.rollout.model.projection import Projection
from rewardsmith.rollout.model.weights import Weights

RANK, SCALING, LEARNING_RATE = 16, 2.0, 1e-5
DTYPES = [torch.float32, torch.float64]


class Trained:
    """Weights and the adapter trained for them, A as PEFT begins it, B zero; AdamW with random gradients."""

    def __init__(self, dtype: torch.dtype = torch.float32, merge: bool | None = None, rank: int = RANK) -> None:
        model = random_model("qwen2", hidden_size=64, intermediate_size=160, initializer_range=0.02).to(dtype)
        self.weights = Weights.fuse(model, describe(model))
        kept = torch.float32 if dtype == torch.bfloat16 else dtype
        self.adapter = {}
        for part in self.weights.parts:
            inputs = next(p for p in self.weights.projections if part in p.parts).base_OI.shape[1]
            name = f"base_model.model.{part.name}.lora_"
            a_RI = torch.empty(rank, inputs, dtype=kept)
            torch.nn.init.kaiming_uniform_(a_RI, a=5**0.5)
            self.adapter[f"{name}A.weight"] = a_RI.requires_grad_()
            self.adapter[f"{name}B.weight"] = torch.zeros(part.stop - part.start, rank, dtype=kept).requires_grad_()
        self.optimizer = torch.optim.AdamW(self.adapter.values(), lr=LEARNING_RATE)
        self.weights.bind(self.detached(), SCALING, merge)

    def detached(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach() for name, tensor in self.adapter.items()}

    def update(self) -> None:
        for name, tensor in self.adapter.items():
            # While B is zero, no gradient reaches A.
            still = "lora_A" in name and not self.adapter[name.replace("lora_A", "lora_B")].any()
            tensor.grad = torch.zeros_like(tensor) if still else torch.randn_like(tensor)
        self.optimizer.step()

    def copy(self, only: str = "lora_") -> None:
        for name, tensor in self.weights.adapter().items():
            if only in name:
                tensor.copy_(self.adapter[name].detach())

    def deliver(self) -> None:
        self.copy()
        self.weights.merge()


def fault(trained: Trained, step: int) -> str:
    with pytest.raises(DeliveryError) as caught:
        trained.weights.verify(step)
    return caught.value.message


@pytest.mark.parametrize(
    ("dtype", "merge", "rank"),
    [
        (torch.float32, True, RANK),
        (torch.float32, True, 64),
        (torch.float32, False, RANK),
        (torch.float64, True, RANK),
        (torch.bfloat16, None, RANK),
        (torch.bfloat16, True, RANK),
    ],
)
def test_no_alarm_over_200_updates(dtype: torch.dtype, merge: bool | None, rank: int):
    torch.manual_seed(rank)
    trained = Trained(dtype, merge, rank)
    for step in range(200):
        # From first steps to an adapter as large as the weights.
        trained.optimizer.param_groups[0]["lr"] = LEARNING_RATE * 10 ** (step / 50)
        trained.update()
        trained.deliver()
        trained.weights.verify(step)
    assert trained.weights.merged == bool(merge)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("updates", [1, 2, 30])
def test_a_merged_copy_that_was_not_rebuilt(dtype: torch.dtype, updates: int):
    trained = Trained(dtype)
    for step in range(1, updates):
        trained.update()
        trained.deliver()
        trained.weights.verify(step)
    trained.update()
    trained.copy()
    cause = (
        "the adapter was never merged into them" if updates == 1 else "they were not rebuilt since the adapter changed"
    )
    words = fault(trained, updates)
    assert f"the merged weights of model.layers.0.self_attn.q_proj are not base plus adapter: {cause} (row" in words
    assert "; 13 more of 14 linear layers are wrong too" in words


@pytest.mark.parametrize("left_out", range(8))
def test_one_projection_of_the_merged_copy_that_was_not_rebuilt(left_out: int):
    trained = Trained()
    trained.update()
    trained.deliver()
    trained.update()
    trained.copy()
    for index in set(range(8)) - {left_out}:
        trained.weights.merge(index, 8)
    parts = trained.weights.projections[left_out].parts
    words = fault(trained, 2)
    assert f"{parts[0].name} are not base plus adapter: they were not rebuilt" in words
    others = f"; {len(parts) - 1} more of 14 linear layers are wrong too"
    assert words.endswith(others) if len(parts) > 1 else "more of" not in words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("wrong", "said"), [(1.0, "1"), (0.125, "0.125"), (32.0, "32")])
def test_merged_with_another_scaling(dtype: torch.dtype, wrong: float, said: str):
    trained = Trained(dtype)
    trained.update()
    trained.copy()
    projection = trained.weights.layers[1].down
    projection.scaling = wrong
    trained.weights.merge()
    # Whether the number is put right afterwards or not.
    words = fault(trained, 1)
    assert words == f"model.layers.1.mlp.down_proj applies its adapter times {wrong}, not 2.0"
    projection.scaling = SCALING
    words = fault(trained, 1)
    found = re.search(r"model.layers.1.mlp.down_proj .*: the adapter was merged times (\S+), not 2 \(row", words)
    assert found and float(found[1]) == pytest.approx(float(said), rel=2e-2)
    assert "more of" not in words


def merge_and_unmerge(projection: Projection) -> None:
    """As engines do that have one copy of the weights only."""
    for part in projection.bound:
        assert part.a_RI is not None and part.b_OR is not None
        rows_PI = projection.base_OI[part.start : part.stop]
        added_PI = (SCALING * part.b_OR @ part.a_RI).to(rows_PI.dtype)
        rows_PI += added_PI
        rows_PI -= added_PI


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_base_that_drifts_by_merging_and_unmerging(dtype: torch.dtype):
    """(W + d) - d is W again but where W is smaller than d, so the drift begins when the adapter has some size."""
    torch.manual_seed(3)
    trained = Trained(dtype)
    trained.optimizer.param_groups[0]["lr"] = 1e-3
    for step in range(5):
        trained.update()
        trained.deliver()
        trained.weights.verify(step)
    merge_and_unmerge(trained.weights.layers[0].gate_up)
    trained.weights.merge()  # from what is the base now: base plus adapter is consistent in itself
    words = fault(trained, 5)
    assert "the base weights of model.layers.0.mlp.gate_proj changed since they were loaded (row" in words
    assert "; 1 more of 14" in words  # up_proj


def test_every_row_has_its_turn():
    trained = Trained()
    trained.update()
    trained.deliver()
    projection = trained.weights.layers[1].qkv
    projection.base_OI[70, 5] = torch.nextafter(projection.base_OI[70, 5], torch.tensor(9.0))  # row 6 of k_proj's 32
    found = []
    for step in range(32):
        try:
            trained.weights.verify(step)
        except DeliveryError as error:
            found.append(error.message)
    assert len(found) == 1
    assert "base weights of model.layers.1.self_attn.k_proj changed since they were loaded (row 6)" in found[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_rows_that_were_written_to(dtype: torch.dtype):
    trained = Trained(dtype)
    trained.update()
    trained.deliver()
    merged_OI = trained.weights.layers[0].out.merged_OI
    assert merged_OI is not None
    merged_OI[:, 3] += 1e-6
    words = fault(trained, 1)
    assert (
        "model.layers.0.self_attn.o_proj are not base plus adapter: they were written to since they were built" in words
    )
    assert "is off by 1e-06" in words


@pytest.mark.parametrize("only", ["lora_A", "lora_B"])
def test_a_or_b_delivered_without_the_other(only: str):
    trained = Trained()
    for _ in range(2):  # the first update leaves A as it is
        trained.update()
        trained.deliver() if not trained.weights.adapter()[first(trained)].any() else trained.copy(only)
    trained.weights.merge()
    # What is merged is what is bound: only the whole adapter's fingerprint can tell.
    trained.weights.verify(2)
    difference = Fingerprint.of(trained.detached()).difference(Fingerprint.of(trained.weights.adapter()))
    assert difference.startswith("14 different (first: base_model.model.model.layers.0.mlp.down_proj.lora_")
    # Merged in between, the copy has the one and the engine says it has both.
    trained.copy()
    assert "not rebuilt since the adapter changed" in fault(trained, 2)


def first(trained: Trained) -> str:
    return next(name for name in trained.adapter if "lora_B" in name)


def test_beside_the_weights_a_wrong_scaling_and_a_changed_base_are_seen_too():
    trained = Trained(merge=False)
    trained.update()
    trained.deliver()
    trained.weights.verify(0)
    changes: list[tuple[Callable[[Projection], Any], str]] = [
        (lambda projection: setattr(projection, "scaling", 1.0), "applies its adapter times 1.0, not 2.0"),
        (lambda projection: projection.base_OI.mul_(1.01), "base weights of model.layers.1.self_attn.q_proj changed"),
    ]
    for change, words in changes:
        again = Trained(merge=False)
        change(again.weights.layers[1].qkv)
        assert words in fault(again, 5)
