"""Batch statistics by the CUDA kernels' own source, run on the CPU: their digits, and guards around every output."""

from __future__ import annotations

import ctypes

import on_cpu
import pytest
import torch
from guarded import DTYPES, Guarded, activation, pointer

pytestmark = on_cpu.needed

# N, C, H, W: vector path; ragged groups; one channel; several tiles of channels; fewer rows than a visit; many chunks
SHAPES = [(2, 16, 3, 5), (2, 13, 3, 3), (3, 1, 2, 2), (1, 272, 2, 2), (1, 8, 1, 1), (2, 264, 5, 7), (3, 24, 40, 41)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    loaded = ctypes.CDLL(str(on_cpu.compiled("statistics.cpp", tmp_path_factory.mktemp("cuda_on_cpu"))))
    loaded.bn_stats_partial_floats.restype = ctypes.c_int64
    return loaded


def statistics(kernels, z):
    """Mean, second moment, number of launches."""
    n, c, h, w = z.shape
    rows, channels = ctypes.c_int64(n * h * w), ctypes.c_int64(c)
    partial = Guarded((kernels.bn_stats_partial_floats(rows, channels),), torch.float32)
    mean, m2 = Guarded((c,), torch.float32), Guarded((c,), torch.float32)
    outputs = [t.pointer() for t in (partial, mean, m2)]
    launches = kernels.bn_stats(ctypes.c_int(DTYPES[z.dtype]), rows, channels, pointer(z), *outputs)
    assert not partial.value().isnan().any() or z.isnan().any()
    return mean.value(), m2.value(), launches


def assert_exact(kernels, z, bound=2e-6):
    """Within `bound` of the deviation, and of the second moment."""
    mean, m2, launches = statistics(kernels, z)
    wide = z.double()
    var, exact = torch.var_mean(wide, (0, 2, 3), correction=0)
    want = var * (z.numel() // z.shape[1])
    rounding = exact.abs() * torch.finfo(torch.float32).eps
    assert ((mean.double() - exact).abs() <= bound * var.sqrt() + rounding).all()
    assert ((m2.double() - want).abs() <= bound * want).all()
    assert launches == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_values(kernels, dtype, shape, offset):
    assert_exact(kernels, activation(shape, dtype, torch.Generator().manual_seed(1), offset).add_(0.5))


def test_large_means(kernels):
    z = activation((3, 24, 40, 41), torch.float32, torch.Generator().manual_seed(2))
    assert_exact(kernels, z * 1e-2 + 1e4)
    assert_exact(kernels, z + 2.0**20)


@pytest.mark.parametrize("far", [1e3, 1e6])
@pytest.mark.parametrize("rows", [1, 32, 1000], ids=lambda rows: f"{rows} rows")
def test_what_begins_far_from_the_others(kernels, rows, far):
    """Where no row of a chunk, or no chunk, is like the one whose mean they are taken about."""
    z = activation((1, 16, 100, 50), torch.float32, torch.Generator().manual_seed(3))
    z.permute(0, 2, 3, 1).view(-1, 16)[:rows] += far
    assert_exact(kernels, z, 1e-5)


def test_constants_have_no_deviation(kernels):
    for value in (0.0, 0.1, -1e4):
        z = torch.full((2, 3, 30, 31), value).contiguous(memory_format=torch.channels_last)
        mean, m2, _ = statistics(kernels, z)
        torch.testing.assert_close(mean, z[0, :, 0, 0], rtol=2e-7, atol=0)
        assert (m2 <= z.numel() * (2e-7 * value) ** 2).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(kernels, value):
    z = activation((2, 16, 9, 9), torch.float32, torch.Generator().manual_seed(4))
    want = statistics(kernels, z)
    for pixel in (0, 8):
        spoilt = z.clone()
        spoilt[0, 5, pixel, pixel] = value
        for got, clean in zip(statistics(kernels, spoilt)[:2], want, strict=False):
            assert not got[5].isfinite() and torch.equal(got[torch.arange(16) != 5], clean[torch.arange(16) != 5])


def test_twice_alike_and_nothing_to_read(kernels):
    z = activation((3, 24, 40, 41), torch.bfloat16, torch.Generator().manual_seed(5))
    first, second = statistics(kernels, z), statistics(kernels, z)
    assert all(map(torch.equal, first[:2], second[:2])), "the order of summation must not depend on scheduling"
    mean, m2, launches = statistics(kernels, z[:0])
    assert launches == 1 and not mean.any() and not m2.any()
    assert statistics(kernels, z[:, :0])[2] == 0


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 1000])
def test_partials_of_chunks_of_any_size_are_merged(kernels, chunk_rows):
    """As an epilogue would write them: about any origin near the chunk's data."""
    z = torch.randn(1000, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 1e-2 + 100
    partials = []
    for chunk in z.split(chunk_rows):
        origin = chunk[0].float().double()
        partials.append(torch.stack([origin, (chunk - origin).sum(0), (chunk - origin).square().sum(0)]))
    partial, mean, m2 = torch.stack(partials).float(), Guarded((5,), torch.float32), Guarded((5,), torch.float32)
    sizes = map(ctypes.c_int64, (chunk_rows, 1000, 5))
    kernels.merge_moments(pointer(partial), *sizes, mean.pointer(), m2.pointer())
    torch.testing.assert_close(mean.value(), z.mean(0).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(m2.value(), (z - z.mean(0)).square().sum(0).float(), rtol=2e-6, atol=0)
