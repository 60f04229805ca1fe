"""The gradients of 1x1 convolutions on tensor cores, their own source run on the CPU: each tile, splits of the rows,
float32 as TF32, and addresses; `test_ops.py` has the ops' cases."""

from __future__ import annotations

import ctypes

import cuda_ops
import on_cpu
import pytest
import torch
from guarded import DTYPES, Guarded, pointer, tf32

from resnet_fused.backends import Backend, cuda_conv
from resnet_fused.backends.selfcheck.draws import Case, place
from resnet_fused.ops import lazy
from resnet_fused.testing import cases, check, poisoned_allocations
from resnet_fused.testing.conv1x1_cases import Pointwise

pytestmark = on_cpu.needed
WIDE, HIGH, SMALL, ELEMENTS = 1, 2, 3, 4
GRADIENT = ("z", "mask", "a", "b", "d", "scale", "shift", "sample_factor")

# x at stride 1, outputs, multiprocessors
SEVERAL_TILES, MANY_SPLITS = ((2, 136, 6, 7), 200, 3), ((1, 24, 40, 41), 8, 16)
WHOLE = [(case, tile) for case in (SEVERAL_TILES, MANY_SPLITS) for tile in (WIDE, HIGH, SMALL)]
CASES = [*WHOLE, (((3, 65, 5, 6), 33, 3), ELEMENTS), (((1, 1, 1, 1), 1, 3), ELEMENTS), (MANY_SPLITS, ELEMENTS)]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    library = on_cpu.compiled("conv1x1_gradients.cpp", tmp_path_factory.mktemp("cuda_on_cpu"))
    return ctypes.CDLL(str(library)).conv1x1_wgrad


def drawn(shape, outputs, dtype, stride):
    """g, x, the rest of a lazy gradient, and scale and shift of a lazy x; every product of them is exact in float32."""
    draw = Pointwise(shape, outputs)
    x = draw.data(draw.dense(shape[1], (stride, stride)))
    case = place(
        Case("", (draw.data(draw.wide), x), draw.gradient("recompute", "abd", True) | draw.lazy()), dtype, "cpu"
    )
    options = dict(case.kwargs)
    return *case.args, options, (options.pop("x_scale"), options.pop("x_shift"))


def run(kernel, g, x, options, applied, stride, tile, multiprocessors, rounded=False):
    """grad_weight, sum_g, and the number of splits."""
    (n, k, p, q), (_, c, h, w) = g.shape, x.shape
    grad, sums = Guarded((k, c), g.dtype if rounded else torch.float32), Guarded((k,), torch.float32)
    gradient = [pointer(g).value, *(pointer(options.get(name)).value for name in GRADIENT)]
    splits = kernel(
        ctypes.c_int(DTYPES[g.dtype]),
        ctypes.c_int(tile),
        ctypes.c_int(multiprocessors),
        (ctypes.c_int * 9)(n, h, w, c, k, p, q, stride, stride),
        (ctypes.c_void_p * 9)(*gradient),
        *map(pointer, (x, *applied)),
        grad.pointer(),
        sums.pointer(),
        ctypes.c_bool(rounded),
    )
    return grad.value(), sums.value(), splits


def expected(g, x, options, applied, stride):
    """In float64, of operands as tensor cores have them."""
    dz, read = lazy.gradient(g, **options), lazy.pixels(lazy.activation(x, *applied), (stride, stride))
    sums = dz.double().sum((0, 2, 3))
    if g.dtype == torch.float32:
        dz, read = tf32(dz), tf32(read)
    return lazy.matrix(dz).T @ lazy.matrix(read), sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "tile"), CASES, ids=[f"{case}, tile {tile}" for case, tile in CASES])
def test_weight_gradient(kernel, case, tile, dtype):
    if tile == HIGH and dtype == torch.float32:
        pytest.skip("of 32 bits it would lack registers, and there is none")
    (shape, outputs, multiprocessors), stride = case, 2 if case == SEVERAL_TILES else 1
    given = (*drawn(shape, outputs, dtype, stride), stride)
    grad, sums, splits = run(kernel, *given, tile, multiprocessors)
    product, total = expected(*given)
    size = product.abs().max().item()
    torch.testing.assert_close(grad.double(), product, rtol=1e-6, atol=1e-6 * size)
    torch.testing.assert_close(sums.double(), total, rtol=1e-6, atol=1e-5)
    assert splits > 16 if case == MANY_SPLITS else splits >= 1
    again, *_ = run(kernel, *given, tile, multiprocessors)
    rounded, *_ = run(kernel, *given, tile, multiprocessors, rounded=True)
    assert torch.equal(again, grad) and torch.equal(rounded, grad.to(dtype))


@pytest.mark.parametrize(
    ("op", "endings"),
    [("conv1x1_dgrad", ("strided residual", "x stride 2")), ("conv1x1_wgrad", (", stride 2", "rounded"))],
)
def test_float32_whose_values_tf32_holds(op, endings, monkeypatch):
    """Cases whose operands have few bits are as exact as if float32 were not rounded to TF32."""
    monkeypatch.setattr(cuda_conv, "_unbuilt", lambda arch: "")
    backend = Backend("cuda on cpu", ("cpu",), cuda_ops.kernels())
    found = [case for case in cases(op, torch.float32) if case.name.endswith(endings)]
    assert len(found) > 12
    with poisoned_allocations():
        for case in found:
            assert check(backend, op, case, torch.float32, torch.device("cpu")) == []


def test_addresses_stay_within_the_tensors(tmp_path):
    """Under AddressSanitizer and UBSan, every tensor in memory of just its size, both gradients in every tile."""
    done = on_cpu.run_sanitized("conv1x1_gradients.cpp", tmp_path)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
