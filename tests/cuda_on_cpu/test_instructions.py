"""The CPU's stand-ins for mma.sync, ldmatrix and cp.async, and the warp's product made of them: see instructions.h."""

from __future__ import annotations

import ctypes

import on_cpu
import pytest
import torch
from guarded import DTYPES, pointer

pytestmark = on_cpu.needed


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    loaded = ctypes.CDLL(str(on_cpu.compiled("instructions.cpp", tmp_path_factory.mktemp("cuda_on_cpu"))))
    loaded.rounded_to_tf32.restype = ctypes.c_uint32
    return loaded


def drawn(rows, width, dtype, seed):
    """Values that TF32 holds as well as 16 bits do, so that every product is exact."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-64, 65, (rows, width // dtype.itemsize), generator=generator) / 8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fragments_product_is_a_product(parts, dtype):
    a, b, start = drawn(16, 32, dtype, 1), drawn(8, 32, dtype, 2), torch.arange(128.0).view(16, 8)
    got = start.clone()
    parts.fragment_product(DTYPES[dtype], pointer(a), pointer(b), pointer(got))
    assert torch.equal(got, start + a.float() @ b.float().T)


def test_matrices_are_dealt_as_documented(parts):
    """The second of two rows of 16-bit values, of the third matrix, by hand."""
    rows = torch.arange(32 * 8, dtype=torch.int16)
    words = torch.zeros(32, 4, dtype=torch.int32)
    parts.matrices(pointer(rows), pointer(words))
    pairs = words.view(torch.int16).view(32, 4, 2)
    assert pairs[6, 2].tolist() == [(16 + 1) * 8 + 4, (16 + 1) * 8 + 5]
    assert sorted(pairs.flatten().tolist()) == rows.tolist()


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_warps_product_is_a_product(parts, dtype, wait):
    """From swizzled shared memory; a kernel that does not wait for its copies computes with what was there."""
    a, b = drawn(32, 128, dtype, 3), drawn(32, 128, dtype, 4)
    got = torch.zeros(32, 32)
    parts.shared_product(DTYPES[dtype], pointer(a), pointer(b), pointer(got), ctypes.c_bool(wait))
    assert torch.equal(got, a.float() @ b.float().T) == wait
    assert got.isnan().all() != wait


def test_tf32_is_rounded_to_nearest(parts):
    values = torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-20, -(1 + 3 * 2**-11), float("inf"), float("nan"), 0.0])
    words = [parts.rounded_to_tf32(ctypes.c_uint32(word & 0xFFFFFFFF)) for word in values.view(torch.int32).tolist()]
    got = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)
    expected = torch.tensor([1 + 2**-10, 1, -(1 + 2**-9), float("inf"), float("nan"), 0.0])
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0)) and got[4].isnan()
