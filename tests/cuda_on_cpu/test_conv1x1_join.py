"""The join of a residual block on tensor cores, its own source run on the CPU, in every tile: values and mask bits;
`test_ops.py` has the op's cases."""

from __future__ import annotations

import ctypes
import itertools

import on_cpu
import pytest
import torch
from guarded import DTYPES, Guarded, activation, pointer, tf32

from resnet_fused.ops.contract import mask_shape, pack_mask
from resnet_fused.ops.lazy import strided_shape

pytestmark = on_cpu.needed
CHOSEN, NARROW, SMALL, ELEMENTS = 0, 2, 3, 4
VECTORS = ("scale", "shift", "residual_scale", "residual_shift", "scale2", "shift2")

# x, outputs, x2, stride of x2
SHAPES = {
    "chosen: largest, but with a projection": ((2, 24, 21, 20), 136, (2, 40, 42, 39), 2),
    "several steps": ((3, 136, 6, 7), 72, (3, 72, 6, 7), 1),
    "odd": ((2, 65, 5, 6), 33, (2, 3, 9, 12), 2),
    "one value": ((1, 1, 1, 1), 1, (1, 1, 1, 1), 1),
}
TILES = [(name, tile) for name in SHAPES for tile in (CHOSEN, ELEMENTS)]
TILES += [("several steps", tile) for tile in (NARROW, SMALL)]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    library = ctypes.CDLL(str(on_cpu.compiled("conv1x1_join.cpp", tmp_path_factory.mktemp("cuda_on_cpu"))))
    return library.conv1x1_join


class Drawn:
    """Arguments of a join with all that it may have; :meth:`without` leaves some of it away."""

    def __init__(self, name, dtype):
        self.shape, k, self.shape2, self.stride2 = SHAPES[name]
        generator = torch.Generator().manual_seed(1)
        c, c2 = self.shape[1], self.shape2[1]
        self.x, self.x2 = (activation(shape, dtype, generator) for shape in (self.shape, self.shape2))
        self.weight, self.weight2 = (activation((k, size, 1, 1), dtype, generator) / 4 for size in (c, c2))
        self.x_scale, self.x_shift = torch.randn(2, c, generator=generator)
        self.vectors = dict(zip(VECTORS, torch.randn(6, k, generator=generator), strict=True))
        self.residual = activation((self.shape[0], k, *self.shape[2:]), dtype, generator)
        self.factor = torch.arange(self.shape[0]) * 0.75

    def without(self, *names):
        for name in names:
            if name in VECTORS:
                self.vectors[name] = None
            else:
                setattr(self, name, None)
        return self

    def sum(self):
        """In float64, of operands as tensor cores have them."""
        x, wide = (
            self.x,
            {name: None if v is None else v.double().view(1, -1, 1, 1) for name, v in self.vectors.items()},
        )
        if self.x_scale is not None:
            scale, shift = (v.double().view(1, -1, 1, 1) for v in (self.x_scale, self.x_shift))
            x = torch.relu(x.double() * scale + shift).float().to(x.dtype)
        y = product(x, self.weight) * wide["scale"] + wide["shift"]
        if self.factor is not None:
            y = y * self.factor.double().view(-1, 1, 1, 1)
        if self.residual is not None:
            r = self.residual.double()
            y = y + (r if wide["residual_scale"] is None else r * wide["residual_scale"] + wide["residual_shift"])
        if self.x2 is not None:
            pixels = self.x2[:, :, :: self.stride2, :: self.stride2]
            y = y + product(pixels, self.weight2) * wide["scale2"] + wide["shift2"]
        return y


def product(x, weight):
    if x.dtype == torch.float32:
        x, weight = tf32(x), tf32(weight)
    return torch.nn.functional.conv2d(x.double(), weight.double())


def geometry(x, k, stride):
    _, k, p, q = strided_shape(x, k, (stride, stride))
    return (ctypes.c_int * 15)(*(x.shape[i] for i in (0, 2, 3, 1)), k, 1, 1, p, q, stride, stride, 0, 0, 1, 1)


def run(kernel, a, tile, relu=True):
    """The result, and the bits of its mask."""
    k, dtype = a.weight.shape[0], a.x.dtype
    out = Guarded((a.shape[0], k, *a.shape[2:]), dtype)
    mask = Guarded(mask_shape(torch.empty(out.shape, device="meta")), torch.uint8)
    launches = kernel(
        ctypes.c_int(DTYPES[dtype]),
        ctypes.c_int(tile),
        geometry(a.x, k, 1),
        geometry(a.x if a.x2 is None else a.x2, k, 1 if a.x2 is None else a.stride2),
        *map(pointer, (a.x, a.x_scale, a.x_shift, a.weight)),
        (ctypes.c_void_p * 6)(*(pointer(v).value for v in a.vectors.values())),
        ctypes.c_bool(a.x2 is not None),
        *map(pointer, (a.residual, a.x2, a.weight2, a.factor)),
        out.pointer(),
        mask.pointer(),
        ctypes.c_bool(relu),
    )
    assert launches == 1
    return out.value(), mask.value()


def check(kernel, a, tile, relu=True):
    out, mask = run(kernel, a, tile, relu)
    want, eps = a.sum(), max(torch.finfo(out.dtype).eps, 1e-6)
    want = torch.relu(want) if relu else want
    torch.testing.assert_close(out.double(), want, rtol=eps, atol=4e-6 * want.abs().max().item())
    assert torch.equal(mask, pack_mask(~(out <= 0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "tile"), TILES)
def test_values(kernel, name, tile, dtype):
    projection = ("x2", "weight2", "scale2", "shift2")
    check(kernel, Drawn(name, dtype), tile)
    check(kernel, Drawn(name, dtype).without(*projection), tile)
    check(
        kernel, Drawn(name, dtype).without("x_scale", "x_shift", "residual", "residual_scale", "residual_shift"), tile
    )


@pytest.mark.parametrize("relu", [False, True])
def test_each_part_by_itself(kernel, relu):
    parts = ("x_scale", "x_shift"), ("residual", "residual_scale", "residual_shift"), ("factor",)
    projection = ("x2", "weight2", "scale2", "shift2")
    for left in itertools.product((False, True), repeat=4):
        names = [name for gone, part in zip(left, (*parts, projection), strict=True) if gone for name in part]
        check(kernel, Drawn("several steps", torch.bfloat16).without(*names), CHOSEN, relu)
    check(kernel, Drawn("several steps", torch.float16).without("residual_scale", "residual_shift"), CHOSEN, relu)


def test_what_is_not_finite_passes_and_keeps_its_bit(kernel):
    a = Drawn("several steps", torch.bfloat16)
    a.x[1, 5, 2, 3], a.x2[0, 3, 1, 1], a.residual[2, 7, 0, 0] = float("nan"), float("nan"), float("nan")
    out, mask = run(kernel, a, CHOSEN)
    assert torch.equal(out.isnan(), a.sum().isnan()) and out[1, :, 2, 3].isnan().all() and out[2, 7, 0, 0].isnan()
    assert torch.equal(mask, pack_mask(~(out <= 0)))


def test_a_projection_of_no_channels_is_its_shift(kernel):
    a = Drawn("several steps", torch.float16)
    a.x2, a.weight2 = torch.empty(3, 0, 6, 7).half(), torch.empty(72, 0, 1, 1).half()
    out, _ = run(kernel, a, CHOSEN, relu=False)
    whole = Drawn("several steps", torch.float16)
    whole.x2 = torch.zeros_like(whole.x2)
    assert torch.equal(out, run(kernel, whole, ELEMENTS, relu=False)[0])
