"""The stem's pooling by the CUDA kernels' own source, run on the CPU: values, guards around outputs, addresses."""

from __future__ import annotations

import ctypes

import on_cpu
import pytest
import torch
from guarded import DTYPES, Guarded, activation, pointer

from resnet_fused.ops import norm_relu_pool, norm_relu_pool_apply, norm_relu_pool_backward

pytestmark = on_cpu.needed

# N, C, H, W, then kernel, stride, padding of both axes
LAYERS = {
    "stem": ((2, 16, 13, 10), (3, 3), (2, 2), (1, 1)),
    "ragged channels": ((2, 13, 9, 7), (3, 3), (2, 2), (1, 1)),
    "one value": ((1, 1, 1, 1), (3, 3), (2, 2), (1, 1)),
    "several visits": ((3, 8, 65, 66), (3, 3), (2, 2), (1, 1)),
    "tiles of channels": ((1, 264, 6, 7), (3, 3), (2, 2), (1, 1)),
    "gaps": ((2, 24, 11, 8), (2, 2), (3, 3), (1, 1)),
    "overlapping": ((2, 8, 7, 6), (5, 4), (2, 1), (2, 2)),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    loaded = ctypes.CDLL(str(on_cpu.compiled("pooling.cpp", tmp_path_factory.mktemp("cuda_on_cpu"))))
    loaded.pool_partial_floats.restype = ctypes.c_int64
    return loaded


class Drawn:
    """Arguments of a layer, of values on a coarse grid: the winner is the same in every arithmetic."""

    def __init__(self, layer, dtype):
        shape, *self.window = layer
        generator = torch.Generator().manual_seed(1)
        self.z = (activation(shape, torch.float32, generator).mul(4).round() / 4).to(dtype)
        self.mean, self.a, self.b, self.d = torch.randn(4, shape[1], generator=generator)
        self.scale = torch.randint(-2, 3, (shape[1],), generator=generator) / 2
        self.shift = torch.randint(-2, 3, (shape[1],), generator=generator) / 4 + 0.125
        self.shape = norm_relu_pool.pooled_shape(self.z, *self.window)
        self.index = norm_relu_pool.reference(self.z, self.scale, self.shift, *self.window)[1]
        self.grad = activation(self.shape, dtype, generator)

    def sizes(self):
        (n, c, *image), axes = self.z.shape, zip(*self.window, strict=True)
        of_axes = [(size, windows, *w) for size, windows, w in zip(image, self.shape[2:], axes, strict=True)]
        return (ctypes.c_int * 12)(n, c, *of_axes[0], *of_axes[1])


def run(kernels, name, a, inputs, *outputs):
    """The values of `outputs`, and the number of launches."""
    pointers = [*map(pointer, inputs), *(out.pointer() for out in outputs)]
    launches = getattr(kernels, name)(ctypes.c_int(DTYPES[a.z.dtype]), a.sizes(), *pointers)
    return *(out.value() for out in outputs), launches


def close(got, want, dtype):
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(got.double(), want.double(), rtol=2 * eps, atol=4 * eps, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_forward(kernels, layer, dtype):
    a = Drawn(LAYERS[layer], dtype)
    out, index = Guarded(a.shape, dtype), Guarded(a.shape, torch.uint8)
    got, places, launches = run(kernels, "norm_relu_pool", a, (a.z, a.scale, a.shift), out, index)
    want, expected = norm_relu_pool.reference(a.z.double(), a.scale.double(), a.shift.double(), *a.window)
    assert torch.equal(got.double(), want.to(dtype).double()) and torch.equal(places, expected) and launches == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_backward(kernels, layer, dtype):
    a = Drawn(LAYERS[layer], dtype)
    partial = Guarded((kernels.pool_partial_floats(a.sizes()),), torch.float32)
    sums = [Guarded((a.z.shape[1],), torch.float32) for _ in range(2)]
    inputs = (a.grad, a.index, a.z, a.mean, a.scale, a.shift)
    _, *got, launches = run(kernels, "norm_relu_pool_backward", a, inputs, partial, *sums)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    for sum_, want in zip(got, norm_relu_pool_backward.reference(*wide, *a.window), strict=True):
        torch.testing.assert_close(sum_.double(), want, rtol=1e-5, atol=1e-4)
    assert launches == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_apply(kernels, layer, dtype, frozen):
    a = Drawn(LAYERS[layer], dtype)
    b, d = (None, None) if frozen else (a.b, a.d)
    inputs = (a.grad, a.index, a.z, a.a, b, d, a.scale, a.shift)
    got, launches = run(kernels, "norm_relu_pool_apply", a, inputs, Guarded(a.z.shape, dtype))
    wide = [t if t is None or not t.is_floating_point() else t.double() for t in inputs]
    close(got, norm_relu_pool_apply.reference(*wide, *a.window), dtype)
    assert launches == 1


def test_what_lies_off_alignment_is_read_element_by_element(kernels):
    a = Drawn(LAYERS["stem"], torch.bfloat16)
    want = Guarded(a.shape, torch.bfloat16), Guarded(a.shape, torch.uint8)
    *want, _ = run(kernels, "norm_relu_pool", a, (a.z, a.scale, a.shift), *want)
    a.z = activation(a.z.shape, torch.bfloat16, torch.Generator(), offset=1).copy_(a.z)
    got = Guarded(a.shape, torch.bfloat16), Guarded(a.shape, torch.uint8)
    *got, _ = run(kernels, "norm_relu_pool", a, (a.z, a.scale, a.shift), *got)
    assert all(map(torch.equal, got, want))


def test_a_gradient_that_is_not_finite_reaches_its_winner_alone(kernels):
    a = Drawn(LAYERS["stem"], torch.float32)
    a.grad[:] = float("nan")
    got, _ = run(kernels, "norm_relu_pool_apply", a, (a.grad, a.index, a.z, a.a, None, None, a.scale, a.shift),
                 Guarded(a.z.shape, torch.float32))  # fmt: skip
    ones = norm_relu_pool_apply.reference(torch.ones_like(a.grad), a.index, a.z, torch.ones(16), None, None, a.scale,
                                          a.shift, *a.window)  # fmt: skip
    assert torch.equal(got.isnan(), ones != 0) and not got.isnan().all()


def test_quotients_are_exact(kernels):
    for divisor in (*range(1, 20), 127, 128, 129, 1000, 65537, (1 << 30) - 1, 1 << 30):
        multiples = {0, 1, 5, 1000, ((1 << 31) - 1) // divisor}
        for n in {k * divisor + more for k in multiples for more in (-1, 0, 1)} | {(1 << 31) - 1, 1 << 30}:
            if 0 <= n < 1 << 31:
                assert kernels.quotient(ctypes.c_int(n), ctypes.c_int(divisor)) == n // divisor, (n, divisor)


def test_addresses_stay_within_the_tensors(tmp_path):
    """Under AddressSanitizer and UBSan, every tensor in memory of just its size."""
    done = on_cpu.run_sanitized("pooling.cpp", tmp_path)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
