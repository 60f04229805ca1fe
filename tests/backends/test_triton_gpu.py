"""Run the suites of the Triton kernels and of chains made of them on the GPU, where there is one."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU; test_triton_interpreter.py runs these tests on the CPU", allow_module_level=True)

from triton_chains import *  # noqa: F403
from triton_suite import *  # noqa: F403
