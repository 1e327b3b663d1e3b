"""The CUDA kernel under Triton's interpreter, which takes CPU tensors.

Needs Triton, which is no dependency on CPUs: TRITON_INTERPRET=1 pytest tests/rollout/test_triton_kernels.py
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
    pytest.skip("runs with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

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
