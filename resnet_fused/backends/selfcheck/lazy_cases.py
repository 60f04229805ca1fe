"""Self-check cases of the ops around 1x1 convolutions, Gram joins and pools; see :mod:`.cases`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...ops import OPS
from ...ops.contract import pack_mask
from .draws import ODD, TAIL, Case, Draw

Tensor = torch.Tensor


def gram(dtype: torch.dtype) -> Iterator[Case]:
    for name, shape in (("odd channels", ODD), ("tail rows", TAIL)):
        draw = Draw(shape)
        yield Case(name, (draw.data(), draw.vector()), {})
    draw = Draw(TAIL)
    yield Case("lazy input", (draw.data(), draw.vector(), draw.vector(), draw.vector()), {})
    yield Case("stride 2", (draw.data(), draw.vector()), {"stride": [2, 2]})


OUTPUTS = 24  # output channels of the 1x1 cases


def _weight(draw: Draw, inputs: int, outputs: int = OUTPUTS) -> Tensor:
    """A 1x1 weight: multiples of 1/8 in [-4, 4], scaled down by a power of two so that sums stay exact in float32."""
    return draw.data((outputs, inputs, 1, 1)) / 16


def lazy_gradient(draw: Draw, shape: tuple[int, int, int, int]) -> dict:
    """Options of a gradient that is masked by a recomputed sign and goes through batch norm's backward."""
    names = ("a", "b", "d", "scale", "shift")
    return {"z": draw.data(shape)} | {name: draw.vector(shape[1]) for name in names}


def norm(draw: Draw, channels: int) -> dict:
    """What an op that takes statistics needs for batch norm."""
    return {"gamma": draw.vector(channels), "beta": draw.vector(channels), "eps": 1e-3}


def conv1x1(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    yield Case("plain, odd channels, no statistics", (odd.data(), _weight(odd, 7, 5)), {"emit_stats": False})
    lazy = {"x_scale": tail.vector(), "x_shift": tail.vector()}
    yield Case("lazy input, tail rows", (tail.data(), _weight(tail, 40)), lazy)
    yield Case("stride 2", (tail.data(), _weight(tail, 40)), {"stride": [2, 2]})
    yield Case("lazy input, batch norm", (tail.data(), _weight(tail, 40)), lazy | norm(tail, OUTPUTS))


def conv1x1_join(dtype: torch.dtype) -> Iterator[Case]:
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


def conv1x1_dgrad(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail, wide = Draw(ODD), Draw(TAIL), (3, OUTPUTS, 9, 7)
    yield Case("plain, odd channels", (odd.data(), _weight(odd, 5, 7)), {})
    add = {"residual": tail.data((3, 40, 5, 4)), "residual_stride": [2, 2]}
    yield Case("lazy gradient, strided residual", (tail.data(wide), _weight(tail, 40)), lazy_gradient(tail, wide) | add)
    bits = {"residual": tail.data(), "residual_mask": pack_mask(tail.data() > 0)}
    yield Case("masked residual", (tail.data(wide), _weight(tail, 40)), bits)
    half = _weight(tail, 40, 40)
    coupling = {"coupling": half + half.transpose(0, 1), "constant": tail.vector()}
    lazy = {"x": tail.data(), "x_scale": tail.vector(), "x_shift": tail.vector(), "x_mean": tail.vector()}
    masked = {"mask": pack_mask(tail.data(wide) > 0), "a": tail.vector(OUTPUTS), "sample_factor": tail.factor()}
    yield Case("Gram join: bits, coupling, sums", (tail.data(wide), _weight(tail, 40)), masked | coupling | lazy)
    small = (3, OUTPUTS, 5, 4)
    read = {"x": tail.data(), "x_stride": [2, 2], "mask": pack_mask(tail.data(small) > 0)}
    yield Case("Gram join: bits, stride 2", (tail.data(small), _weight(tail, 40)), read | coupling)
    yield Case("no weight: coupling, sums", (tail.data(), None), coupling | lazy)
    through = lazy | {"x_rstd": tail.vector().abs()}
    yield Case("Gram join: coefficients", (tail.data(wide), _weight(tail, 40)), masked | coupling | through)
    both = lazy_gradient(tail, wide) | {"x": tail.data(), "weight_grad": True}
    yield Case("both gradients, masked residual", (tail.data(wide), _weight(tail, 40)), both | bits)
    yield Case("both gradients, coefficients", (tail.data(wide), _weight(tail, 40)), both | through)


def conv1x1_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail, wide = Draw(ODD), Draw(TAIL), (3, OUTPUTS, 9, 7)
    yield Case("plain, odd channels", (odd.data(), odd.data((2, 5, 5, 3))), {})
    lazy = {"x_scale": tail.vector(), "x_shift": tail.vector()}
    yield Case("lazy gradient and input", (tail.data(wide), tail.data()), lazy_gradient(tail, wide) | lazy)
    rounded = lazy | {"rounded": True}
    yield Case("lazy gradient and input, rounded", (tail.data(wide), tail.data()), lazy_gradient(tail, wide) | rounded)
    bits = {"mask": pack_mask(tail.data(wide) > 0), "stride": [2, 2], "sample_factor": tail.factor()}
    yield Case("bits, factor, stride 2", (tail.data(wide), tail.data((3, 40, 17, 14))), bits)
    join = GramJoin(TAIL)
    weight, _, gram, total, centre, _, scale, rstd, a = join.grad()
    joined = {"join_weight": weight, "gram": gram, "total": total, "centre": centre}
    joined |= {"join_scale": scale, "join_rstd": rstd, "mask": pack_mask(tail.data(wide) > 0)}
    yield Case("Gram join", (tail.data(wide), a), joined)


def conv1x1_backward(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail, wide = Draw(ODD), Draw(TAIL), (3, OUTPUTS, 9, 7)
    yield Case("plain, odd channels", (odd.data((2, 5, 5, 3)), _weight(odd, 7, 5), odd.data((2, 7, 5, 3))), {})
    lazy = {"x_scale": tail.vector(), "x_shift": tail.vector()}
    gram = {"mask": pack_mask(tail.data(wide) > 0), "weight_scale": tail.vector(OUTPUTS)}
    arguments = (tail.data(wide), _weight(tail, 40), tail.data())
    yield Case("Gram join: bits", arguments, gram | lazy)
    sums = lazy | {"x_mean": tail.vector(), "sample_factor": tail.factor()}
    yield Case("lazy gradient, sums", arguments, lazy_gradient(tail, wide) | sums)
    through = sums | {"x_rstd": tail.vector().abs(), "rounded": True}
    yield Case("lazy gradient, coefficients, rounded", arguments, lazy_gradient(tail, wide) | through)
    bits = {"residual": tail.data(), "residual_mask": pack_mask(tail.data() > 0)}
    yield Case("lazy gradient, masked residual", arguments, lazy_gradient(tail, wide) | bits)
    half = _weight(tail, 40, 40)
    coupled = {"coupling": half + half.transpose(0, 1), "constant": tail.vector(), "residual": tail.data()}
    yield Case("lazy gradient, coupling, residual", arguments, lazy_gradient(tail, wide) | coupled)


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
        product, sum_g, *_ = OPS["conv1x1_wgrad"].reference(self.data((n, self.outputs, h, w)), self.a)
        scale, rstd = self.vector(self.outputs), self.vector(self.outputs).abs() + 0.0625
        return self.weight, product, self.gram, self.total, self.centre, sum_g, scale, rstd, self.a


def gram_norm(dtype: torch.dtype) -> Iterator[Case]:
    far = Draw(TAIL).far_from_zero(dtype)
    yield Case("odd channels", GramJoin(ODD, 5).norm(), {})
    yield Case("large mean, tail rows", GramJoin(TAIL, OUTPUTS, far, far[0, :, 0, 0].clone()).norm(), {})
    join = GramJoin(TAIL)
    yield Case("batch norm, tail rows", join.norm(), norm(join, OUTPUTS))


def gram_grad(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("odd channels", GramJoin(ODD, 5).grad(), {})
    yield Case("tail rows, several tiles", GramJoin((3, 72, 9, 7)).grad(), {})


def bn_affine(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    yield Case("odd channels", (odd.vector(), odd.vector().abs(), odd.vector(), odd.vector(), odd.data(), 1e-5), {})
    vectors = (tail.vector(200), tail.vector(200).abs() * 64)
    yield Case("several programs", (*vectors, tail.vector(200), tail.vector(200), tail.data(), 1e-3), {})
    yield Case("no gamma, no beta", (*vectors, None, None, tail.data(), 1e-5), {})
    yield Case("no pixels", (odd.vector(), odd.vector() * 0, odd.vector(), None, odd.data()[:0], 0.25), {})


def bn_coefficients(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    yield Case("odd channels", (*(odd.vector() for _ in range(5)), odd.data()), {})
    yield Case("several programs", (*(tail.vector(200) for _ in range(5)), tail.data()), {})
    yield Case("no pixels", (odd.vector() * 0, odd.vector() * 0, *(odd.vector() for _ in range(3)), odd.data()[:0]), {})


def running_affine(dtype: torch.dtype) -> Iterator[Case]:
    odd, tail = Draw(ODD), Draw(TAIL)
    vectors = (odd.vector(), odd.vector().abs(), odd.vector(), odd.vector(), odd.vector())
    yield Case("odd channels, bias", (*vectors, 1e-5), {})
    vectors = (tail.vector(200), tail.vector(200).abs() * 64)
    yield Case("several programs", (*vectors, tail.vector(200), tail.vector(200), None, 1e-3), {})
    yield Case("no gamma, no beta", (*vectors, None, None, None, 1e-5), {})


def _update(draw: Draw, channels: int, counter: int | None, factor: float = 1.0) -> tuple:
    """The arguments of one norm in `running_update`."""
    count = None if counter is None else torch.tensor(counter)
    running = draw.vector(channels), draw.vector(channels).abs()
    return (*running, count, draw.vector(channels), draw.vector(channels).abs(), factor)


def running_update(dtype: torch.dtype) -> Iterator[Case]:
    draw = Draw(ODD)
    yield Case("one norm, no counter", (*_update(draw, 7, None), 0.5), {})
    others = (*_update(draw, 40, 3, 1.5), *_update(draw, 1, None, 1.25), *_update(draw, 129, 1 << 40, 2.0))
    yield Case("four norms", (*_update(draw, 200, 0, 1.125), 0.125, *others), {})


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
        z, *affine = self.forward(z)
        out, index = OPS["norm_relu_pool"].reference(z, *affine)
        grad_out = self.data(out.shape)
        grad_out = torch.where(out <= 0, torch.nan, grad_out) if nan_where_masked else grad_out
        return grad_out, index, z, self.vector(), *affine

    def apply(self, z: Tensor | None = None, affine: bool = True, nan_where_masked: bool = False) -> tuple:
        """Arguments of `norm_relu_pool_apply`."""
        grad_out, index, z, _, *rest = self.backward(z, nan_where_masked)
        b, d = (self.vector(), self.vector()) if affine else (None, None)
        return grad_out, index, z, self.vector(), b, d, *rest


def norm_relu_pool(dtype: torch.dtype) -> Iterator[Case]:
    odd = PoolDraw(ODD)
    z = odd.data()
    z[0, 0, 1:3, 1] = torch.nan
    yield Case("NaN, odd channels", odd.forward(z), {})
    yield Case("tail rows", PoolDraw(TAIL).forward(), {})
    yield Case("2x2, no padding", PoolDraw(TAIL, (2, 2), (2, 2), (0, 0)).forward(), {})


def norm_relu_pool_backward(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("NaN where masked, odd channels", PoolDraw(ODD).backward(nan_where_masked=True), {})
    yield Case("tail rows", PoolDraw(TAIL).backward(), {})
    yield Case("nine windows a pixel", PoolDraw(TAIL, (3, 3), (1, 1), (1, 1)).backward(), {})


def norm_relu_pool_apply(dtype: torch.dtype) -> Iterator[Case]:
    yield Case("frozen, odd channels", PoolDraw(ODD).apply(affine=False), {})
    yield Case("NaN where masked, tail rows", PoolDraw(TAIL).apply(nan_where_masked=True), {})
    yield Case("2x2, no padding", PoolDraw(TAIL, (2, 2), (2, 2), (0, 0)).apply(), {})
