"""The convolution on tensor cores, its own source run on the CPU: values in every tile, and guards around outputs."""

from __future__ import annotations

import ctypes

import on_cpu
import pytest
import torch
from guarded import DTYPES, Guarded, activation, pointer

from resnet_fused.ops import conv_join, conv_norm_add_relu
from resnet_fused.ops.contract import mask_shape, pack_mask
from resnet_fused.ops.conv_add_relu import output_shape

pytestmark = on_cpu.needed
CHOSEN, LARGE, NARROW, SMALL, ELEMENTS = range(5)

# x, weight, stride, padding, dilation
WHOLE = {  # channels that fill chunks
    "1x1, several steps": ((2, 136, 6, 7), (72, 136, 1, 1), 1, 0, 1),
    "1x1, stride 2, tiles across": ((1, 64, 9, 9), (200, 64, 1, 1), 2, 0, 1),
    "3x3": ((3, 24, 8, 7), (40, 24, 3, 3), 1, 1, 1),
    "3x3, stride 2, many pixels": ((4, 8, 30, 30), (16, 8, 3, 3), 2, 1, 1),
    "3x3, dilated": ((1, 72, 7, 7), (8, 72, 3, 3), 1, 2, 2),
    "5x3, no padding": ((1, 16, 9, 6), (8, 16, 5, 3), 1, 0, 1),
    "padding beyond the filter": ((1, 8, 2, 2), (8, 8, 1, 1), 1, 2, 1),
}
ODD = {
    "7x7 stem": ((2, 3, 21, 19), (64, 3, 7, 7), 2, 3, 1),
    "one channel, one output": ((1, 1, 5, 5), (1, 1, 3, 3), 1, 1, 1),
    "65 channels, dilated": ((1, 65, 6, 6), (67, 65, 3, 3), 1, 2, 2),
    "one pixel": ((3, 20, 1, 1), (5, 20, 3, 3), 1, 1, 1),
    "one value": ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1),
    "odd outputs": ((1, 16, 12, 12), (9, 16, 3, 3), 1, 1, 1),
}
CASES = [(name, case, tile) for name, case in WHOLE.items() for tile in (LARGE, NARROW, SMALL, ELEMENTS)]
CASES += [(name, case, ELEMENTS) for name, case in ODD.items()]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return ctypes.CDLL(str(on_cpu.compiled("conv.cpp", tmp_path_factory.mktemp("cuda_on_cpu")))).conv_norm_add_relu


def rounded(t):
    """Values that TF32 holds: what the tensor core would round is rounded."""
    return t if t.dtype != torch.float32 else (t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


class Drawn:
    """Arguments of a case, as the op has them."""

    def __init__(self, case, dtype, offset=0):
        shape, kernel, *self.where = case
        generator = torch.Generator().manual_seed(1)
        self.x = rounded(activation(shape, dtype, generator, offset))
        self.weight = rounded(activation(kernel, dtype, generator, offset) / 4)
        self.vectors = list(torch.randn(5, kernel[0], generator=generator))
        self.vectors[2] = self.vectors[2].abs() + 0.5
        self.shape = output_shape(shape, kernel, *([n] * 2 for n in self.where))
        self.residual = activation(self.shape, dtype, generator)
        self.norm = [None] * 5


def run(kernel, a, tile=CHOSEN, residual=None, relu=False, waits=True, join=(None,) * 3, mask=None):
    out = Guarded(a.shape, a.x.dtype)
    (n, c, h, w), (k, _, r, s), (_, _, p, q) = a.x.shape, a.weight.shape, a.shape
    geometry = (ctypes.c_int * 15)(n, h, w, c, k, r, s, p, q, *(number for number in a.where for _ in range(2)))
    launches = kernel(
        ctypes.c_int(DTYPES[a.x.dtype]),
        ctypes.c_int(tile),
        ctypes.c_bool(waits),
        geometry,
        *map(pointer, (a.x, a.weight, *a.norm)),
        ctypes.c_float(1e-3),
        pointer(residual),
        out.pointer(),
        ctypes.c_bool(relu),
        *map(pointer, join),
        pointer(None) if mask is None else mask.pointer(),
    )
    return out.value(), launches


def expected(a, residual=None, relu=False):
    wide = [None if t is None else t.double() for t in (a.x, a.weight, *a.norm, residual)]
    *read, residual = wide
    return conv_norm_add_relu.reference(*read, 1e-3, residual, *([n] * 2 for n in a.where), relu)


def check_join(kernel, a, tile=CHOSEN):
    """With all that `conv_join` may have: scale and shift as they are, a factor for each sample, and bits."""
    join = *a.vectors[:2], torch.arange(a.shape[0]) * 0.75
    mask = Guarded(mask_shape(torch.empty(a.shape, device="meta")), torch.uint8)
    out, _ = run(kernel, a, tile, a.residual, True, join=join, mask=mask)
    *read, residual, factor = (t.double() for t in (a.x, a.weight, *join[:2], a.residual, join[2]))
    close(out, conv_join.reference(*read, residual, *([n] * 2 for n in a.where), factor)[0], a.x.dtype)
    assert torch.equal(mask.value(), pack_mask(~(out <= 0)))


def close(got, want, dtype):
    """Sums of float32, rounded once."""
    eps = max(torch.finfo(dtype).eps, 1e-6)
    size = want[want.isfinite()].abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=4e-6 * size, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case", "tile"), CASES, ids=[f"{name}, tile {tile}" for name, _, tile in CASES])
def test_values(kernel, name, case, tile, dtype):
    if tile == LARGE and dtype == torch.float32:
        pytest.skip("of 32 bits the largest tile lacks registers, and there is none")
    a = Drawn(case, dtype)
    got, launches = run(kernel, a, tile, waits=tile != NARROW)
    close(got, expected(a), dtype)
    assert launches == 1
    a.norm = a.vectors
    got, _ = run(kernel, a, tile, a.residual, True)
    close(got, expected(a, a.residual, True), dtype)
    check_join(kernel, a, tile)


@pytest.mark.parametrize("present", range(5))
def test_each_vector_by_itself(kernel, present):
    """Bias; mean and var; with gamma, with beta, with both."""
    a = Drawn(ODD["odd outputs"], torch.float16)
    bias, mean, var, gamma, beta = a.vectors
    a.norm = [
        [bias, None, None, None, None],
        [None, mean, var, None, None],
        [bias, mean, var, gamma, None],
        [None, mean, var, None, beta],
        [None, mean, var, gamma, beta],
    ][present]
    close(run(kernel, a)[0], expected(a), torch.float16)


def test_what_lies_off_alignment_is_read_element_by_element(kernel):
    a = Drawn(WHOLE["3x3"], torch.bfloat16, offset=1)
    close(run(kernel, a)[0], expected(a), torch.bfloat16)


@pytest.mark.parametrize("pixel", [(0, 0), (3, 4)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock(kernel, value, pixel):
    a = Drawn(WHOLE["3x3"], torch.bfloat16)
    a.x[1, 5, pixel[0], pixel[1]] = value
    got, want = run(kernel, a, relu=True)[0], expected(a, relu=True)
    assert torch.equal(got.isnan(), want.isnan()) and want.isfinite().any() and not want.isfinite().all()
    close(got, want, torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 16, 3, 3), (2, 0, 3, 3)], ids=str)
def test_nothing_to_read(kernel, shape):
    """An empty batch launches nothing; without input channels there is the bias alone."""
    a = Drawn((shape, (8, shape[1], 1, 1), 1, 0, 1), torch.float16)
    a.norm = [a.vectors[0], None, None, None, None]
    got, launches = run(kernel, a)
    assert launches == (shape[0] > 0)
    assert torch.equal(got, a.vectors[0].half().view(1, 8, 1, 1).expand(a.shape))


def test_addresses_stay_within_the_tensors(tmp_path):
    """Under AddressSanitizer and UBSan, every tensor in memory of just its size."""
    done = on_cpu.run_sanitized("conv.cpp", tmp_path)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
