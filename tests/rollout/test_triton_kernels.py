"""The CUDA kernel under Triton's interpreter, which takes CPU tensors.

Triton decides whether it interprets when it is imported, so the tests run in a process of their own. It comes with
torch's CUDA build and is no dependency on CPUs: `make test-triton` installs it and runs this.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("interpreted_triton.py")


@pytest.mark.slow
def test_the_kernel_under_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: make test-triton installs it")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", TESTS],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
