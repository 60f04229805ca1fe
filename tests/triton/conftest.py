"""Where the suites run, and the fixtures that they share."""

import importlib.util
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()

#: All run in the interpreter, in processes that test_interpreter.py starts; on a GPU they are collected here too, but
#: for those whose tensors lie on the CPU.
ON_GPU = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
collect_ignore_glob = ["suite_faults.py", "suite_interpreter.py"] if ON_GPU else ["suite_*.py"]


@pytest.fixture
def poisoned_outputs():
    """Every uninitialised tensor is filled with NaN or the largest integer: an element not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def full_float32(monkeypatch):
    """Bounds are those of float32; that TF32 is used where it is allowed, test_triton_compile.py sees."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
