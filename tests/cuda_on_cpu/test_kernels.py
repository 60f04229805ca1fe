"""The CUDA kernels' own source, run on the CPU (see cuda_on_cpu.h): values, and guards around every output."""

from __future__ import annotations

import ctypes

import on_cpu
import pytest
import torch
from guarded import DTYPES, Guarded, activation, pointer

from resnet_fused.ops import lazy_grad_apply, norm_add_relu, norm_add_relu_backward
from resnet_fused.ops.contract import mask_shape, pack_mask

pytestmark = on_cpu.needed

# N, C, H, W: vector path; ragged groups; one channel; several tiles of channels; more rows than one visit of the grid
SHAPES = [(2, 16, 3, 5), (2, 13, 3, 3), (3, 1, 2, 2), (1, 272, 2, 2), (2, 264, 5, 7), (2, 8, 25, 26)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    loaded = ctypes.CDLL(str(on_cpu.compiled("kernels.cpp", tmp_path_factory.mktemp("cuda_on_cpu"))))
    loaded.partial_floats.restype = ctypes.c_int64
    return loaded


def geometry(x):
    n, c, h, w = x.shape
    return [ctypes.c_int(DTYPES[x.dtype]), *map(ctypes.c_int64, (n * h * w, c, max(h * w, 1)))]


def forward(kernels, z, scale, shift, residual=None, r_scale=None, r_shift=None, factor=None, relu=True):
    out, mask = Guarded(z.shape, z.dtype), Guarded(mask_shape(z), torch.uint8)
    inputs = map(pointer, (z, scale, shift, residual, r_scale, r_shift, factor))
    launches = kernels.norm_add_relu(*geometry(z), *inputs, out.pointer(), mask.pointer(), ctypes.c_bool(relu))
    return out.value(), mask.value(), launches


def backward(kernels, grad, z, mean, scale, shift, bits, output, residual, residual_mean, factor, emit_grad):
    n, c, h, w = grad.shape
    g = Guarded(grad.shape, grad.dtype)
    size = kernels.partial_floats(ctypes.c_int64(n * h * w), ctypes.c_int64(c), ctypes.c_bool(residual is not None))
    partial = Guarded((size,), torch.float32)
    sums = [Guarded((c,), torch.float32) for _ in range(4)]
    present = [True, z is not None, residual is not None, residual is not None]
    kernels.norm_add_relu_backward(
        *geometry(grad),
        *map(pointer, (grad, z, mean, scale, shift, bits, output, residual, residual_mean, factor)),
        g.pointer() if emit_grad else pointer(None),
        partial.pointer(),
        *[s.pointer() if there else pointer(None) for s, there in zip(sums, present, strict=True)],
    )
    partial.value()
    return g.value() if emit_grad else None, [s.value() for s, there in zip(sums, present, strict=True) if there]


def close(actual, expected, dtype):
    """Within two roundings of the dtype, of values that are sums of terms of order one."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2 * eps, atol=8 * eps, equal_nan=True)


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual_kind", ["none", "plain", "affine"])
def test_forward(kernels, dtype, shape, residual_kind):
    generator = torch.Generator().manual_seed(1)
    c = shape[1]
    z = activation(shape, dtype, generator)
    vectors = [torch.randn(c, generator=generator) for _ in range(4)]
    residual = None if residual_kind == "none" else activation(shape, dtype, generator)
    r_scale, r_shift = vectors[2:] if residual_kind == "affine" else (None, None)
    for factor in (None, torch.tensor([0.0, 1.25, 2.0])[: shape[0]].contiguous()):
        for relu in (True, False):
            args = (z, *vectors[:2], residual, r_scale, r_shift, factor)
            out, mask, launches = forward(kernels, *args, relu=relu)
            expected, _ = norm_add_relu.reference(*double(*args), relu=relu)
            close(out, expected.to(dtype), dtype)
            assert torch.equal(mask, pack_mask(~(out <= 0)))
            assert launches == 1


def test_forward_passes_nan_and_negative_zero_and_reads_unaligned_data(kernels):
    generator = torch.Generator().manual_seed(2)
    z = activation((1, 16, 2, 2), torch.float16, generator, offset=1)
    z[0, 3, 1, 1] = float("nan")
    z[0, 5, 0, 1] = -0.0
    out, mask, _ = forward(kernels, z, torch.ones(16), torch.full((16,), -0.0))
    expected, expected_mask = norm_add_relu.reference(z, torch.ones(16), torch.full((16,), -0.0), emit_mask=True)
    assert torch.equal(
        out.contiguous().view(torch.int16)[~z.isnan()], expected.contiguous().view(torch.int16)[~z.isnan()]
    )
    assert out[0, 3, 1, 1].isnan()
    assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize("shape", [(0, 16, 3, 3), (2, 16, 0, 3)], ids=str)
def test_empty_tensors_launch_nothing(kernels, shape):
    z = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    assert forward(kernels, z, torch.ones(16), torch.ones(16))[2] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keep", ["bits", "output", "recompute", "all"])
def test_backward(kernels, dtype, shape, keep):
    generator = torch.Generator().manual_seed(3)
    grad, z, out, residual = (activation(shape, dtype, generator) for _ in range(4))
    grad[-1, -1, -1, -1] = float("nan")  # where it is masked it must not reach the sums
    out[-1, -1, -1, -1] = 0.0
    mean, scale, shift = torch.randn(3, shape[1], generator=generator)
    scale[-1], shift[-1] = 0.0, -1.0
    if keep == "all":
        grad[-1, -1, -1, -1] = 0.5
    bits = pack_mask(~(out <= 0)) if keep == "bits" else None
    output = out if keep == "output" else None
    recompute = (scale, shift) if keep == "recompute" else (None, None)
    factor = torch.tensor([1.5, 0.0, 2.0])[: shape[0]].contiguous()
    for r, f, emit_grad in (
        (None, None, True),
        (residual, None, False),
        (residual, factor, True),
        (None, factor, False),
    ):
        r_mean = None if r is None else shift
        args = (grad, z, mean, *recompute, bits, output, r, r_mean, f)
        g, sums = backward(kernels, *args, emit_grad)
        mask = bits if bits is not None else out.double() if keep == "output" else None
        expected = norm_add_relu_backward.reference(
            *double(grad, z, mean, scale, shift), mask, *double(r, r_mean, f), relu=keep != "all"
        )
        if emit_grad:
            assert torch.equal(g.contiguous(), expected[0].to(dtype).contiguous())
        for actual, total in zip(sums, [e for e in expected[1:] if e.numel()], strict=True):
            torch.testing.assert_close(actual.double(), total, rtol=1e-5, atol=1e-4)


def test_backward_without_z_and_twice_alike(kernels):
    generator = torch.Generator().manual_seed(4)
    grad = activation((2, 24, 9, 9), torch.float32, generator)
    first = backward(kernels, grad, *[None] * 9, True)
    second = backward(kernels, grad, *[None] * 9, True)
    assert len(first[1]) == 1
    assert torch.equal(first[0], grad) and torch.equal(second[0], grad)
    assert torch.equal(first[1][0], second[1][0]), "the order of summation must not depend on scheduling"
    torch.testing.assert_close(first[1][0], grad.sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_lazy_gradient(kernels, dtype, shape, in_place):
    generator = torch.Generator().manual_seed(5)
    g, z, residual = (activation(shape, dtype, generator) for _ in range(3))
    a, b, d, scale, shift = torch.randn(5, shape[1], generator=generator)
    scale[-1], shift[-1] = 0.0, -1.0
    g[:, -1] = float("nan")  # which is masked
    factor = torch.tensor([1.5, 0.0, 2.0])[: shape[0]].contiguous()
    for affine, r, f in ((True, None, None), (False, residual, None), (True, residual, factor), (False, None, factor)):
        args = (g, z, a, *((b, d) if affine else (None, None)), scale, shift, f, r)
        dz = Guarded(shape, dtype)
        if in_place:
            dz.value().copy_(g)
        inputs = map(pointer, args)
        launches = kernels.lazy_grad_apply(
            *geometry(g), *(dz.pointer() if in_place and i == 0 else t for i, t in enumerate(inputs)), dz.pointer()
        )
        assert launches == 1
        close(dz.value(), lazy_grad_apply.reference(*double(*args)).to(dtype), dtype)
