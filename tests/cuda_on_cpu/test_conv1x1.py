"""Training's forward product on tensor cores, its own source run on the CPU: what is applied on load, what is stored as
it is, and the statistics of that, in every tile; `test_ops.py` has the op's cases."""

from __future__ import annotations

import ctypes

import on_cpu
import pytest
import torch
from guarded import DTYPES, Guarded, activation, pointer, tf32

from resnet_fused.ops.conv_add_relu import output_shape

pytestmark = on_cpu.needed
CHOSEN, LARGE, NARROW, SMALL, ELEMENTS = range(5)

# x, weight, stride, padding: of the op, and filters that the kernel takes as well
WHOLE = {  # channels that fill chunks
    "several steps": ((2, 136, 6, 7), (72, 136, 1, 1), 1, 0),
    "stride 2, tiles across": ((1, 64, 17, 18), (200, 64, 1, 1), 2, 0),
    "8 channels, many pixels": ((2, 8, 21, 20), (16, 8, 1, 1), 1, 0),
    "3x3": ((3, 24, 8, 7), (40, 24, 3, 3), 1, 1),
    "3x3, 72 channels, stride 2": ((2, 72, 7, 7), (8, 72, 3, 3), 2, 1),
}
ODD = {
    "65 to 33 channels": ((2, 65, 6, 6), (33, 65, 1, 1), 1, 0),
    "3 to 65 channels, stride 2": ((2, 3, 9, 7), (65, 3, 1, 1), 2, 0),
    "one pixel": ((3, 20, 1, 1), (5, 20, 1, 1), 1, 0),
    "one value": ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0),
    "3x3 on three channels": ((1, 3, 9, 8), (8, 3, 3, 3), 1, 1),
}
CASES = [(name, case, tile) for name, case in WHOLE.items() for tile in (LARGE, NARROW, SMALL, ELEMENTS)]
CASES += [(name, case, ELEMENTS) for name, case in ODD.items()]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return ctypes.CDLL(str(on_cpu.compiled("conv1x1.cpp", tmp_path_factory.mktemp("cuda_on_cpu")))).conv1x1


class Drawn:
    """Arguments of a case."""

    def __init__(self, case, dtype, lazy, offset=0):
        shape, kernel, *self.where = case
        generator = torch.Generator().manual_seed(1)
        self.x = activation(shape, dtype, generator, offset)
        self.weight = activation(kernel, dtype, generator, offset) / 4
        self.vectors = None
        if lazy:
            self.vectors = torch.randn(shape[1], generator=generator), torch.rand(shape[1], generator=generator) + 0.5
        self.shape = output_shape(shape, kernel, *([n] * 2 for n in self.where), (1, 1))

    def product(self):
        """In float64, of operands as tensor cores have them."""
        x, weight = self.x, self.weight
        if self.vectors:
            scale, shift = (v.double().view(1, -1, 1, 1) for v in self.vectors)
            x = torch.relu(x.double() * scale + shift).float().to(self.x.dtype)
        if self.x.dtype == torch.float32:
            x, weight = tf32(x), tf32(weight)
        stride, padding = self.where
        return torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, padding)


def run(kernel, a, tile=CHOSEN, statistics=True, waits=True, multiprocessors=3):
    """z, the statistics, and how many kernels were launched."""
    z = Guarded(a.shape, a.x.dtype)
    found = [Guarded((a.shape[1],), torch.float32) if statistics else None for _ in range(2)]
    (n, c, h, w), (k, _, r, s), (_, _, p, q) = a.x.shape, a.weight.shape, a.shape
    where = (number for number in (*a.where, 1) for _ in range(2))
    geometry = (ctypes.c_int * 15)(n, h, w, c, k, r, s, p, q, *where)
    launches = kernel(
        ctypes.c_int(DTYPES[a.x.dtype]),
        ctypes.c_int(tile),
        ctypes.c_int(multiprocessors),
        ctypes.c_bool(waits),
        geometry,
        *map(pointer, (a.x, *(a.vectors or (None, None)), a.weight)),
        z.pointer(),
        *(ctypes.c_void_p(None) if each is None else each.pointer() for each in found),
    )
    return z.value(), [each.value() for each in found if each is not None], launches


def close(got, want, dtype):
    """Sums of float32, rounded once."""
    eps = max(torch.finfo(dtype).eps, 1e-6)
    size = want[want.isfinite()].abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=4e-6 * size, equal_nan=True)


def statistics_of(z):
    """Of what was stored, whatever rounding made of it."""
    wide = z.double()
    mean = wide.mean((0, 2, 3))
    return mean, (wide - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))


def check_statistics(z, found):
    """To the rounding of float32: of a mean relative to the deviation of the data, if that is larger."""
    (mean, m2), count = statistics_of(z), z.numel() // z.shape[1]
    assert bool(((found[0] - mean).abs() <= 2e-7 * (mean.abs() + 4 * (m2 / count).sqrt())).all())
    torch.testing.assert_close(found[1].double(), m2, rtol=2e-6, atol=1e-9 * count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case", "tile"), CASES, ids=[f"{name}, tile {tile}" for name, _, tile in CASES])
def test_values(kernel, name, case, tile, dtype):
    if tile == LARGE and dtype == torch.float32:
        pytest.skip("of 32 bits the largest tile lacks registers, and there is none")
    for lazy in (False, True):
        a = Drawn(case, dtype, lazy)
        z, found, launches = run(kernel, a, tile, waits=tile != NARROW)
        close(z, a.product(), dtype)
        check_statistics(z, found)
        assert launches == 2
        alone, nothing, launches = run(kernel, a, tile, statistics=False)
        assert torch.equal(alone, z) and nothing == [] and launches == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [NARROW, SMALL])
def test_chunks_of_several_tiles(kernel, tile, dtype):
    """The last tile is a few pixels, the last chunk less than others; twice the same bits."""
    a = Drawn(((1, 8, 67, 61), (16, 8, 1, 1), 1, 0), dtype, True)  # 64 or 32 tiles
    z, found, _ = run(kernel, a, tile, multiprocessors=1)
    close(z, a.product(), dtype)
    check_statistics(z, found)
    again = run(kernel, a, tile, multiprocessors=1)[1]
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("tile", [LARGE, NARROW, SMALL, ELEMENTS])
def test_statistics_far_from_zero(kernel, tile):
    """Values of which float16 has a few hundred around a mean of 1000; a constant has no deviation at all."""
    a = Drawn(((2, 8, 40, 30), (16, 8, 1, 1), 1, 0), torch.float16, False)
    a.x[:, 0], a.x[:, 1:] = 1000 + 4 * a.x[:, 0], a.x[:, 1:] / 16
    a.weight[:, 0] = 1.0
    a.weight[3], a.x[:, 7] = 0.0, 1.0
    a.weight[3, 7] = 0.1
    z, found, _ = run(kernel, a, tile, multiprocessors=1)
    check_statistics(z, found)
    assert found[1][3] <= 1e-9 and bool((found[1][4:] > 1000).all())


def test_what_lies_off_alignment_is_read_element_by_element(kernel):
    a = Drawn(WHOLE["several steps"], torch.bfloat16, True, offset=1)
    z, found, _ = run(kernel, a)
    close(z, a.product(), torch.bfloat16)
    a = Drawn(WHOLE["several steps"], torch.bfloat16, True)
    a.vectors = [torch.cat([v[:1], v])[1:] for v in a.vectors]
    assert a.vectors[0].data_ptr() % 16 != 0
    z, found, _ = run(kernel, a)
    close(z, a.product(), torch.bfloat16)
    check_statistics(z, found)


@pytest.mark.parametrize("tile", [SMALL, ELEMENTS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_not_finite_reaches_what_it_reaches_in_stock(kernel, lazy, value, tile):
    """A NaN passes the ReLU, an infinity that becomes negative does not; other pixels know nothing of them."""
    a = Drawn(WHOLE["several steps"], torch.bfloat16, lazy)
    a.x[1, 5, 3, 4] = value
    z, (mean, m2), _ = run(kernel, a, tile)
    want = a.product()
    close(z, want, torch.bfloat16)
    assert want[0].isfinite().all() and not (value != value and want.isfinite().all())
    assert torch.equal(mean.isfinite(), want.isfinite().all((0, 2, 3))) and torch.equal(mean.isfinite(), m2.isfinite())


@pytest.mark.parametrize("tile", [NARROW, ELEMENTS])
def test_one_outlier_stays_in_its_column(kernel, tile):
    """Infinite from overflow to float16: the statistics of the other outputs are numbers."""
    a = Drawn(WHOLE["several steps"], torch.float16, False)
    a.weight[7] = 30000.0
    z, (mean, m2), _ = run(kernel, a, tile)
    assert z[:, 7].isinf().any() and not mean[7].isfinite()
    kept = [k for k in range(72) if k != 7]
    check_statistics(z[:, kept], (mean[kept], m2[kept]))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("shape", "outputs"), [((0, 16, 3, 3), 8), ((2, 0, 3, 3), 8), ((2, 16, 3, 3), 0)], ids=str)
def test_nothing_to_read_or_to_write(kernel, shape, outputs, lazy):
    """Of an empty batch statistics alone are stored; without input channels all are zeros."""
    a = Drawn((shape, (outputs, shape[1], 1, 1), 1, 0), torch.float16, lazy)
    z, found, launches = run(kernel, a)
    assert launches == (0 if outputs == 0 else 2 if shape[0] else 1)
    assert z.count_nonzero() == 0 and all(each.count_nonzero() == 0 for each in found)


def test_addresses_stay_within_the_tensors(tmp_path):
    """Under AddressSanitizer and UBSan, every tensor in memory of just its size."""
    done = on_cpu.run_sanitized("conv1x1.cpp", tmp_path)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
