"""Every op on every backend that serves this machine, on every case and dtype, against float64.

With TRITON_INTERPRET=1 in the environment the Triton kernels run here too, on CPU tensors:
``TRITON_INTERPRET=1 pytest tests/ops -k triton``.
"""

import os

import pytest
import torch

from resnet_fused.backends import backends
from resnet_fused.ops import OPS
from resnet_fused.ops.contract import channels_last_like
from resnet_fused.testing import cases, check, poisoned_allocations

#: Triton's interpreter is slow, and tests/triton runs the kernels in it too: every fifth case is enough here.
STEP = 5 if os.environ.get("TRITON_INTERPRET") == "1" else 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def device_of(backend):
    return torch.device("cuda" if "cuda" in backend.devices and torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    with poisoned_allocations():
        yield


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """On a GPU too: bounds are those of float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_fresh_memory_is_poisoned(poisoned):
    with poisoned_allocations() as active:
        if not active:
            pytest.skip("this C library has no mallopt(M_PERTURB)")
        assert torch.empty(1000).view(torch.uint8).eq(0x7F).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", backends())
def test_every_case(name, op, dtype):
    backend = backends()[name]
    if backend.unavailable:
        pytest.skip(f"{name}: {backend.unavailable}")
    device, ran, refused, failed = device_of(backend), 0, set(), []
    for case in cases(op, dtype)[:: STEP if name == "triton" else 1]:
        try:
            reasons = check(backend, op, case, dtype, device)
        except AssertionError as error:
            failed.append(f"{case.name}: {error}")
            continue
        refused |= set(reasons)
        ran += not reasons
    assert not failed, "\n".join(failed)
    if not ran:
        pytest.skip(f"{name} {op}: {'; '.join(sorted(refused))}")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("op", ("lazy_grad_apply", "lazy_grad_apply_"))
@pytest.mark.parametrize("name", backends())
def test_residual_of_a_lazy_gradient_is_added_before_it_is_rounded(name, op, dtype):
    """1 + eps/2 alone would be rounded to 1, and so would 1 + eps/4 then."""
    backend, eps = backends()[name], torch.finfo(dtype).eps
    if backend.unavailable:
        pytest.skip(f"{name}: {backend.unavailable}")
    g = channels_last_like(torch.empty(2, 65, 3, 3, device=device_of(backend)), dtype).fill_(1)
    a, residual = torch.full((65,), 1 + eps / 2, device=g.device), torch.full_like(g, eps / 4)
    arguments = (g, None, a, *[None] * 5, residual)
    reasons = backend.reasons(op, arguments, {})
    if reasons:
        pytest.skip(f"{name} {op}: {'; '.join(reasons)}")
    returned = backend.kernels[op].run(*arguments)
    assert (g if returned is None else returned).eq(1 + eps).all()
