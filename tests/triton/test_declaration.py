"""What the Triton backend says where it cannot run; none of it needs Triton."""

import os
import subprocess
import sys
import types

import pytest
import torch

from resnet_fused import backends
from resnet_fused.backends import triton as room


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert room.why_not() == "there is no GPU that torch can use, and TRITON_INTERPRET is not set"


def test_not_installed(monkeypatch, with_gpu):
    monkeypatch.setitem(sys.modules, "triton", None)
    backend = room.declare()
    assert backend.unavailable == "Triton is not installed; pip install triton"
    assert set(backend.kernels) == set(room.OPS)
    with pytest.raises(RuntimeError, match="triton: Triton is not installed"):
        backend.kernels["bn_stats"].run(torch.ones(1, 1, 1, 1))


def test_without_triton_the_kernels_are_declared_as_with_it(monkeypatch, with_gpu):
    """So that a plan for a GPU that is not there does not depend on whether Triton is."""
    pytest.importorskip("triton", reason="Triton is not installed")
    kernels = room.kernels()
    monkeypatch.setitem(sys.modules, "triton", None)
    refused = room.declare().kernels

    def declared(kernel):
        return kernel.dtypes, kernel.unsupported, kernel.widths

    assert {op: declared(kernel) for op, kernel in refused.items()} == {op: declared(k) for op, k in kernels.items()}


def test_too_old(monkeypatch, with_gpu):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.5.1+git1"))
    assert room.why_not() == "Triton 3.5.1+git1 is too old; pip install 'triton>=3.6'"


def test_broken(monkeypatch, with_gpu):
    def broken(name):
        raise OSError("libtriton.so: bad ELF")

    monkeypatch.setattr(room.importlib, "import_module", broken)
    assert room.why_not() == "Triton does not import: libtriton.so: bad ELF; reinstall it"


def test_package_imports_and_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from resnet_fused import backends
mean, m2, *_ = backends.run("bn_stats", torch.ones(2, 3, 2, 2).contiguous(memory_format=torch.channels_last))
assert mean.tolist() == [1, 1, 1] and m2.tolist() == [0, 0, 0]
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_forcing_it_without_a_gpu_names_the_reason():
    with pytest.raises(RuntimeError, match="bn_stats: no backend can run this case\n  triton: there is no GPU"):
        backends.run("bn_stats", torch.ones(1, 1, 1, 1), backend="triton")
