"""Small cases for the self-check: odd channels, tail rows, the options that matter, one or two per branch of a kernel.

Values lie on a coarse grid (eighths and sixteenths), so that every product and sum is exact in float32 and in float64:
the sign of a pre-activation, and with it a mask, is then the same however a kernel orders its arithmetic, and what is
left to differ is the rounding of the result. Only `bn_stats` gets a case with a large mean, where order matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ..ops import OPS, stat_dtype
from ..ops.contract import pack_mask

Tensor = torch.Tensor

ODD = (2, 7, 5, 3)
TAIL = (3, 40, 9, 7)
FLANK = 64  # elements of poison on both sides of every input; keeps its 16-byte alignment


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call, on the CPU and in float64 where they are floating."""

    name: str
    args: tuple
    kwargs: dict


class Draw:
    """Random tensors on a grid, from a generator of its own: the global random state stays untouched."""

    def __init__(self, shape: tuple[int, int, int, int]):
        self.shape = shape
        self.generator = torch.Generator("cpu").manual_seed(0)

    def _grid(self, shape, steps: int, step: float) -> Tensor:
        drawn = torch.randint(-steps, steps + 1, tuple(shape), generator=self.generator, device="cpu")
        return drawn.to(torch.float64) * step

    def data(self, shape=None) -> Tensor:
        """Activations: multiples of 1/8 in [-4, 4]."""
        return self._grid(shape or self.shape, 32, 0.125).contiguous(memory_format=torch.channels_last)

    def vector(self, size: int | None = None) -> Tensor:
        """A per-channel vector: multiples of 1/16 in [-2, 2]."""
        return self._grid((size or self.shape[1],), 32, 0.0625)

    def factor(self) -> Tensor:
        """A per-sample factor: one sample is dropped, the others are scaled by two."""
        factor = torch.full((self.shape[0],), 2.0, dtype=torch.float64, device="cpu")
        factor[0] = 0.0
        return factor

    def far_from_zero(self, dtype: torch.dtype) -> Tensor:
        """Activations with a mean of 64 and a deviation of 256 units in its last place, of float32's for float64."""
        noise = torch.randn(self.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        wide = 64 + noise * (64 * 256 * max(torch.finfo(dtype).eps, 2**-23))
        return wide.to(dtype).double().contiguous(memory_format=torch.channels_last)


def _bn_stats(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("odd channels", (Draw(ODD).data(),), {})
    yield Case("large mean, tail rows", (Draw(TAIL).far_from_zero(dtype),), {})


def _norm_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    z = odd.data()
    z[0, 0, 0, 0] = torch.nan
    yield Case("NaN, mask, odd channels", (z, odd.vector(), odd.vector()), {"emit_mask": True})
    yield Case("residual, no relu", (odd.data(), odd.vector(), odd.vector(), odd.data()), {"relu": False})
    shortcut = {"residual": tail.data(), "residual_scale": tail.vector(), "residual_shift": tail.vector()}
    options = {**shortcut, "sample_factor": tail.factor(), "emit_mask": True}
    yield Case("projection shortcut, factor, mask", (tail.data(), tail.vector(), tail.vector()), options)


def _norm_add_relu_backward(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    recompute = {"z": odd.data(), "scale": odd.vector(), "shift": odd.vector()}
    yield Case("recomputed sign, odd channels", (odd.data(),), recompute)
    output = odd.data().clamp_min(0)
    grad_out = torch.where(output <= 0, torch.nan, odd.data())  # a NaN gradient that the mask must drop
    yield Case("output, sums only", (grad_out,), {"z": odd.data(), "mask": output, "emit_grad": False})
    bits = {"z": tail.data(), "mask": pack_mask(tail.data() > 0), "residual": tail.data()}
    yield Case("bits, projection shortcut, factor", (tail.data(),), {**bits, "sample_factor": tail.factor()})
    yield Case("no relu", (odd.data(),), {"z": odd.data(), "relu": False})


def _lazy_grad_apply(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    yield Case("frozen, odd channels", (odd.data(), None, odd.vector()), {})
    vectors = {name: tail.vector() for name in ("b", "d", "scale", "shift")}
    options = {**vectors, "sample_factor": tail.factor()}
    yield Case("affine, sign, factor", (tail.data(), tail.data(), tail.vector()), options)


def _gram(dtype: torch.dtype) -> Iterator[Case]:
    for name, shape in (("odd channels", ODD), ("tail rows", TAIL)):
        draw = Draw(shape)
        yield Case(name, (draw.data(), draw.vector()), {})
    draw = Draw(TAIL)
    yield Case("lazy input", (draw.data(), draw.vector(), draw.vector(), draw.vector()), {})


OUTPUTS = 24  # output channels of the 1x1 cases


def _weight(draw: Draw, inputs: int, outputs: int = OUTPUTS) -> Tensor:
    """A 1x1 weight: multiples of 1/8 in [-4, 4], scaled down by a power of two so that sums stay exact in float32."""
    return draw.data((outputs, inputs, 1, 1)) / 16


def lazy_gradient(draw: Draw, shape: tuple[int, int, int, int]) -> dict:
    """Options of a gradient that is masked by a recomputed sign and goes through batch norm's backward."""
    names = ("a", "b", "d", "scale", "shift")
    return {"z": draw.data(shape)} | {name: draw.vector(shape[1]) for name in names}


def _conv1x1(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    yield Case("plain, odd channels, no statistics", (odd.data(), _weight(odd, 7, 5)), {"emit_stats": False})
    lazy = {"x_scale": tail.vector(), "x_shift": tail.vector()}
    yield Case("lazy input, tail rows", (tail.data(), _weight(tail, 40)), lazy)
    yield Case("stride 2", (tail.data(), _weight(tail, 40)), {"stride": [2, 2]})


def _conv1x1_join(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    scale, shift = odd.vector(5), odd.vector(5)
    yield Case("plain, odd channels, no relu", (odd.data(), _weight(odd, 7, 5), scale, shift), {"relu": False})
    wide = (3, OUTPUTS, 9, 7)
    lazy = {"x_scale": tail.vector(), "x_shift": tail.vector()}
    arguments = (tail.data(), _weight(tail, 40), tail.vector(OUTPUTS), tail.vector(OUTPUTS))
    residual = {"residual": tail.data(wide), "emit_mask": True}
    yield Case("lazy input, residual, mask", arguments, lazy | residual)
    affine = {"residual_scale": tail.vector(OUTPUTS), "residual_shift": tail.vector(OUTPUTS)}
    yield Case("affine residual, factor", arguments, residual | affine | {"sample_factor": tail.factor()})
    projection = {"x2": tail.data((3, 16, 17, 14)), "weight2": _weight(tail, 16), "stride2": [2, 2]}
    projection |= {"scale2": tail.vector(OUTPUTS), "shift2": tail.vector(OUTPUTS), "emit_mask": True}
    yield Case("projection, stride 2", arguments, lazy | projection)


def _conv1x1_dgrad(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail, wide = Draw(ODD), Draw(TAIL), (3, OUTPUTS, 9, 7)
    yield Case("plain, odd channels", (odd.data(), _weight(odd, 5, 7)), {})
    add = {"residual": tail.data((3, 40, 5, 4)), "residual_stride": [2, 2]}
    yield Case("lazy gradient, strided residual", (tail.data(wide), _weight(tail, 40)), lazy_gradient(tail, wide) | add)
    bits = {"residual": tail.data(), "residual_mask": pack_mask(tail.data() > 0)}
    yield Case("masked residual", (tail.data(wide), _weight(tail, 40)), bits)
    half = _weight(tail, 40, 40)
    coupling = {"coupling": half + half.transpose(0, 1), "constant": tail.vector()}
    lazy = {"x": tail.data(), "x_scale": tail.vector(), "x_shift": tail.vector()}
    masked = {"mask": pack_mask(tail.data(wide) > 0), "a": tail.vector(OUTPUTS), "sample_factor": tail.factor()}
    yield Case("Gram join: bits, coupling, sums", (tail.data(wide), _weight(tail, 40)), masked | coupling | lazy)


def _conv1x1_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail, wide = Draw(ODD), Draw(TAIL), (3, OUTPUTS, 9, 7)
    yield Case("plain, odd channels", (odd.data(), odd.data((2, 5, 5, 3))), {})
    lazy = {"x_scale": tail.vector(), "x_shift": tail.vector()}
    yield Case("lazy gradient and input", (tail.data(wide), tail.data()), lazy_gradient(tail, wide) | lazy)
    bits = {"mask": pack_mask(tail.data(wide) > 0), "stride": [2, 2], "sample_factor": tail.factor()}
    yield Case("bits, factor, stride 2", (tail.data(wide), tail.data((3, 40, 17, 14))), bits)


def _conv_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw(TAIL)
    residual = draw.data((3, 24, 9, 7))
    weight = draw.data((24, 40, 1, 1)) / 4
    yield Case("1x1 join", (draw.data(), weight, draw.vector(24), residual), {"relu": True})
    grouped = {"stride": (2, 2), "padding": (1, 1), "groups": 2}
    yield Case("3x3, stride 2, 2 groups", (draw.data(), draw.data((24, 20, 3, 3)) / 4), grouped)


def _conv_add_relu_inplace(dtype: torch.dtype) -> Iterator[Case]:
    (case, _) = _conv_add_relu(dtype)
    x, weight, shift, residual = case.args
    yield Case(case.name, (residual, x, weight, shift), case.kwargs)


def _conv_weight_grad(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw(TAIL)
    yield Case("1x1", (draw.data((3, 24, 9, 7)), draw.data(), draw.data((24, 40, 1, 1))), {})
    same = {"padding": (1, 1)}
    yield Case("3x3, tail columns", (draw.data((3, 24, 9, 7)), draw.data(), draw.data((24, 40, 3, 3))), same)
    strided = {"stride": (2, 2), "padding": (1, 1)}
    yield Case("3x3, stride 2", (draw.data((3, 24, 5, 4)), draw.data(), draw.data((24, 40, 3, 3))), strided)


class GramJoin(Draw):
    """What the Gram join's ops are given for an input `a`, its gradient's product and sums included."""

    def __init__(self, shape, outputs: int = OUTPUTS, a: Tensor | None = None, centre: Tensor | None = None):
        super().__init__(shape)
        self.outputs = outputs
        self.a = self.data() if a is None else a.double()
        self.centre = self.vector() if centre is None else centre.double()
        self.gram, self.total = OPS["gram"].reference(self.a, self.centre)
        self.weight = _weight(self, shape[1], outputs)

    def norm(self) -> tuple[Tensor, ...]:
        """Arguments of `gram_norm`."""
        return self.weight, self.gram, self.total, self.centre, self.a

    def grad(self) -> tuple[Tensor, ...]:
        """Arguments of `gram_grad`."""
        n, _, h, w = self.shape
        product, sum_g = OPS["conv1x1_wgrad"].reference(self.data((n, self.outputs, h, w)), self.a)
        scale, rstd = self.vector(self.outputs), self.vector(self.outputs).abs() + 0.0625
        return self.weight, product, self.gram, self.total, self.centre, sum_g, scale, rstd, self.a


def _gram_norm(dtype: torch.dtype) -> Iterator[Case]:
    far = Draw(TAIL).far_from_zero(dtype)
    yield Case("odd channels", GramJoin(ODD, 5).norm(), {})
    yield Case("large mean, tail rows", GramJoin(TAIL, OUTPUTS, far, far[0, :, 0, 0].clone()).norm(), {})


def _gram_grad(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("odd channels", GramJoin(ODD, 5).grad(), {})
    yield Case("tail rows, several tiles", GramJoin((3, 72, 9, 7)).grad(), {})


def _bn_affine(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    yield Case("odd channels", (odd.vector(), odd.vector().abs(), odd.vector(), odd.vector(), odd.data(), 1e-5), {})
    vectors = (tail.vector(200), tail.vector(200).abs() * 64)
    yield Case("several programs", (*vectors, tail.vector(200), tail.vector(200), tail.data(), 1e-3), {})
    yield Case("no gamma, no beta", (*vectors, None, None, tail.data(), 1e-5), {})
    yield Case("no pixels", (odd.vector(), odd.vector() * 0, odd.vector(), None, odd.data()[:0], 0.25), {})


def _bn_coefficients(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    yield Case("odd channels", (*(odd.vector() for _ in range(5)), odd.data()), {})
    yield Case("several programs", (*(tail.vector(200) for _ in range(5)), tail.data()), {})
    yield Case("no pixels", (odd.vector() * 0, odd.vector() * 0, *(odd.vector() for _ in range(3)), odd.data()[:0]), {})


class PoolDraw(Draw):
    """What the ops of a pooled stem are given. Activations are multiples of 1/16 with at most eight bits, exact in
    bfloat16 too: no two become equal by rounding, and the winners of windows are the same in every dtype.
    """

    def __init__(self, shape, kernel=(3, 3), stride=(2, 2), padding=(1, 1)):
        super().__init__(shape)
        self.window = (list(kernel), list(stride), list(padding))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scales are powers of two, of either sign and sometimes 0; shifts are multiples of 1/8 in [-2, 2]."""
        size = (self.shape[1],)
        return self.vector().sign() * torch.exp2(self._grid(size, 1, 1.0)), self._grid(size, 16, 0.125)

    def forward(self, z: Tensor | None = None) -> tuple:
        """Arguments of `norm_relu_pool`."""
        return (self.data() if z is None else z, *self.affine(), *self.window)

    def backward(self, z: Tensor | None = None, nan_where_masked: bool = False) -> tuple:
        """Arguments of `norm_relu_pool_backward`; a gradient may be NaN where the winner is no positive value."""
        z, scale, shift, *window = self.forward(z)
        out, index = OPS["norm_relu_pool"].reference(z, scale, shift, *window)
        grad_out = self.data(out.shape)
        grad_out = torch.where(out <= 0, torch.nan, grad_out) if nan_where_masked else grad_out
        return grad_out, index, z, scale, shift, *window

    def apply(self, z: Tensor | None = None, affine: bool = True, nan_where_masked: bool = False) -> tuple:
        """Arguments of `norm_relu_pool_apply`."""
        grad_out, index, z, *rest = self.backward(z, nan_where_masked)
        b, d = (self.vector(), self.vector()) if affine else (None, None)
        return grad_out, index, z, self.vector(), b, d, *rest


def _norm_relu_pool(dtype: torch.dtype) -> Iterator[Case]:
    odd = PoolDraw(ODD)
    z = odd.data()
    z[0, 0, 1:3, 1] = torch.nan
    yield Case("NaN, odd channels", odd.forward(z), {})
    yield Case("tail rows", PoolDraw(TAIL).forward(), {})
    yield Case("2x2, no padding", PoolDraw(TAIL, (2, 2), (2, 2), (0, 0)).forward(), {})


def _norm_relu_pool_backward(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("NaN where masked, odd channels", PoolDraw(ODD).backward(nan_where_masked=True), {})
    yield Case("tail rows", PoolDraw(TAIL).backward(), {})
    yield Case("nine windows a pixel", PoolDraw(TAIL, (3, 3), (1, 1), (1, 1)).backward(), {})


def _norm_relu_pool_apply(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("frozen, odd channels", PoolDraw(ODD).apply(affine=False), {})
    yield Case("NaN where masked, tail rows", PoolDraw(TAIL).apply(nan_where_masked=True), {})
    yield Case("2x2, no padding", PoolDraw(TAIL, (2, 2), (2, 2), (0, 0)).apply(), {})


_CASES = {
    "bn_stats": _bn_stats,
    "bn_affine": _bn_affine,
    "bn_coefficients": _bn_coefficients,
    "norm_add_relu": _norm_add_relu,
    "norm_add_relu_backward": _norm_add_relu_backward,
    "lazy_grad_apply": _lazy_grad_apply,
    "lazy_grad_apply_": _lazy_grad_apply,
    "gram": _gram,
    "conv1x1": _conv1x1,
    "conv1x1_join": _conv1x1_join,
    "conv1x1_dgrad": _conv1x1_dgrad,
    "conv1x1_wgrad": _conv1x1_wgrad,
    "conv_add_relu": _conv_add_relu,
    "conv_add_relu_": _conv_add_relu_inplace,
    "conv_weight_grad": _conv_weight_grad,
    "gram_norm": _gram_norm,
    "gram_grad": _gram_grad,
    "norm_relu_pool": _norm_relu_pool,
    "norm_relu_pool_backward": _norm_relu_pool_backward,
    "norm_relu_pool_apply": _norm_relu_pool_apply,
}


def cases(op: str, dtype: torch.dtype) -> list[Case]:
    """The cases of `op` for activations of `dtype`.

    Raises:
        KeyError: the op has no cases; then no kernel of it can be checked.
    """
    return list(_CASES[op](dtype))


def missing_cases() -> list[str]:
    """Ops without cases."""
    return sorted(set(OPS) - set(_CASES))


def place(case: Case, dtype: torch.dtype, device: torch.device) -> Case:
    """The case on `device`, activations in `dtype` and vectors in the dtype of statistics, poison around every one."""

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            value = value.to(dtype if value.dim() == 4 else stat_dtype(dtype))
        return surrounded(value.to(device))

    return Case(case.name, tuple(map(move, case.args)), {key: move(value) for key, value in case.kwargs.items()})


def surrounded(t: Tensor) -> Tensor:
    """`t` inside a larger buffer of NaN (255 for bytes), so that a read beyond its ends shows in the result."""
    poison = torch.nan if t.is_floating_point() else 255
    buffer = torch.full((t.numel() + 2 * FLANK,), poison, dtype=t.dtype, device=t.device)
    inner = buffer[FLANK : FLANK + t.numel()].as_strided(t.shape, t.stride(), FLANK)
    return inner.copy_(t)
