"""The CUDA kernel on CPU tensors; `test_triton_kernels` runs this in a process that interprets Triton."""

import pytest
import torch
from test_kernels import SHAPES, Scene

from rewardsmith.rollout.fast.kernels import TorchKernels
from rewardsmith.rollout.fast.triton_kernels import TritonKernels


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_that_of_its_twin(name: str):
    scene = Scene(SHAPES[name])
    expected, keys, values = scene.attend(TorchKernels(scene.architecture))
    got, triton_keys, triton_values = scene.attend(TritonKernels(scene.architecture))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert torch.equal(triton_keys.nan_to_num(), keys.nan_to_num())
    assert torch.equal(triton_values.nan_to_num(), values.nan_to_num())
