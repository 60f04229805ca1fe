"""The Gram matrix on tensor cores, its own source run on the CPU: what is applied on load, pairs of tiles, splits of
the rows, digits of the sums; `test_ops.py` has the op's cases, and those of the matrices that follow from it."""

from __future__ import annotations

import ctypes

import on_cpu
import pytest
import torch
from guarded import DTYPES, Guarded, activation, pointer

pytestmark = on_cpu.needed

# a, stride
CASES = {
    "three tiles, several splits": ((2, 136, 18, 19), (1, 1)),
    "one tile, many splits": ((1, 16, 95, 90), (1, 1)),
    "strides": ((3, 72, 17, 15), (2, 3)),
    "one pixel": ((1, 8, 1, 1), (1, 1)),
}
ODD = {
    "65 channels, a few pixels more than a stage": ((1, 65, 10, 7), (1, 1)),
    "three channels, strides": ((2, 3, 9, 40), (3, 1)),
    "one value": ((1, 1, 1, 1), (4, 4)),
}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return ctypes.CDLL(str(on_cpu.compiled("gram.cpp", tmp_path_factory.mktemp("cuda_on_cpu")))).gram


class Drawn:
    """Arguments of a case: values around 1, taken about a centre that is not their mean."""

    def __init__(self, case, dtype, lazy, offset=0):
        shape, self.stride = case
        generator = torch.Generator().manual_seed(1)
        self.a = activation(shape, dtype, generator, offset).add_(1)
        self.centre = torch.rand(shape[1], generator=generator) + 0.5
        vectors = torch.randn(shape[1], generator=generator), torch.rand(shape[1], generator=generator)
        self.vectors = vectors if lazy else (None, None)

    def shifted(self):
        """d, [pixels, C], in float32, which is exact of 16 bits but for one rounding."""
        a = self.a[:, :, :: self.stride[0], :: self.stride[1]]
        rows = a.permute(0, 2, 3, 1).reshape(-1, a.shape[1])
        if self.vectors[0] is not None:
            rows = torch.relu(rows.double() * self.vectors[0] + self.vectors[1]).float().to(a.dtype)
        return rows.float() - self.centre


def run(kernel, a, by_elements=False, waits=True, multiprocessors=3):
    """gram, total, and how many kernels were launched."""
    n, c, h, w = a.a.shape
    found = Guarded((c, c), torch.float32), Guarded((c,), torch.float32)
    rows, columns = (-(-size // step) for size, step in zip((h, w), a.stride, strict=True))
    launches = kernel(
        ctypes.c_int(DTYPES[a.a.dtype]),
        ctypes.c_bool(by_elements),
        ctypes.c_int(multiprocessors),
        ctypes.c_bool(waits),
        (ctypes.c_int * 7)(n, h, w, rows, columns, *a.stride),
        ctypes.c_int(c),
        *map(pointer, (a.a, a.centre, *a.vectors)),
        *(each.pointer() for each in found),
    )
    return found[0].value(), found[1].value(), launches


def check(a, gram, total):
    """Within the rounding of float32 of what all terms sum up to, without their signs."""
    d = a.shifted()
    rounded = d.to(a.a.dtype).double()
    assert ((gram - rounded.T @ rounded).abs() <= 1e-6 * rounded.abs().T @ rounded.abs() + 1e-30).all()
    assert ((total - d.double().sum(0)).abs() <= 1e-6 * d.double().abs().sum(0) + 1e-30).all()
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *ODD])
def test_values(kernel, name, dtype, lazy):
    a = Drawn((CASES | ODD)[name], dtype, lazy)
    gram, total, launches = run(kernel, a, waits=not lazy)
    check(a, gram, total)
    assert launches == 2
    if not lazy:
        return
    by_elements = run(kernel, a, by_elements=True)[:2]
    assert torch.equal(by_elements[0], gram) and torch.equal(by_elements[1], total)


@pytest.mark.parametrize("multiprocessors", [1, 2, 40])
def test_any_number_of_splits(kernel, multiprocessors):
    """One, few, and as many as rows suffice for; on one GPU twice the same bits."""
    a = Drawn(CASES["one tile, many splits"], torch.bfloat16, True)
    first, again = (run(kernel, a, multiprocessors=multiprocessors) for _ in range(2))
    check(a, *first[:2])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_what_lies_off_alignment_is_read_element_by_element(kernel):
    a = Drawn(CASES["strides"], torch.float16, True, offset=1)
    check(a, *run(kernel, a)[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_from_zero_with_a_centre_near_it(kernel, dtype):
    """Differences from the centre are exact, so that no digit of the covariance is lost."""
    a = Drawn(((1, 8, 40, 41), (1, 1)), dtype, False)
    a.a.add_(255)
    a.centre = a.a[0, :, 0, 0].float()
    gram, total, _ = run(kernel, a)
    d = (a.a[0].double().flatten(1) - a.centre.double().unsqueeze(1)).T
    assert torch.equal(d.float().to(dtype).double(), d)
    covariance = gram.double() / len(d) - torch.outer(total.double(), total.double()) / len(d) ** 2
    torch.testing.assert_close(covariance, d.T.cov(correction=0), rtol=1e-5, atol=1e-5 * d.var().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(kernel, value):
    a = Drawn(CASES["strides"], torch.bfloat16, False)
    clean = run(kernel, a)
    a.a[:, :, 1::2] = float("nan")  # which nobody reads
    a.a[1, 5, 2, 3] = value
    gram, total, _ = run(kernel, a)
    others = torch.arange(72) != 5
    assert not total[5].isfinite() and torch.equal(total[others], clean[1][others])
    assert not gram[5].isfinite().any() and torch.equal(gram[others][:, others], clean[0][others][:, others])


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 0, 3, 3)], ids=str)
def test_nothing_to_read(kernel, shape):
    a = Drawn((shape, (1, 1)), torch.float16, True)
    gram, total, launches = run(kernel, a)
    assert gram.count_nonzero() == 0 and total.count_nonzero() == 0 and launches == (1 if shape[1] else 0)


def test_addresses_stay_within_the_tensors(tmp_path):
    """Under AddressSanitizer and UBSan, every tensor in memory of just its size; the small matrices too."""
    done = on_cpu.run_sanitized("gram.cpp", tmp_path)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
