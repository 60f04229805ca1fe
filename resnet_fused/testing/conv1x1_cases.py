"""Cases of the 1x1 ops: options in every combination, then awkward shapes with most of them.

Masks, emitted or recomputed, are the same in every arithmetic. A recomputed sign is of data on the grid of ``Draw``,
which float32 carries exactly. An emitted one depends on the lazy activation as rounded to 16 bits, so its data is
coarser: :meth:`Pointwise.coarse` times a power of two has at most seven bits, and no output's sign is in doubt. Where
no mask is at stake, values are normal deviates. The gradients' cases are in :mod:`.conv1x1_gradient_cases`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case, Draw
from ..ops.contract import pack_mask

Tensor = torch.Tensor

ODD = (2, 65, 3, 5)
OUTPUTS = 33
STRIDES = ((1, 1), (2, 2), (2, 1))
#: name -> shape of x, output channels
SHAPES = {
    "one value": ((1, 1, 1, 1), 1),
    "one row": ((1, 64, 1, 1), 72),
    "one pixel a sample": ((5, 24, 1, 1), 65),
    "ambiguous strides": ((2, 8, 8, 1), 16),
    "many rows": ((2, 24, 21, 20), 40),  # several row tiles, the last one short
    "many channels": ((1, 200, 5, 4), 136),  # several tiles of depth and of columns, the last ones short
    "empty batch": ((0, 8, 3, 3), 24),
}
WIDTHS = (1, 3, 65)
BOTH = (False, True)
MASK = {"emit_mask": True}


class Pointwise(Draw):
    """Draws for a 1x1 convolution: `shape` is the input's, `wide` the output's at stride 1."""

    def __init__(self, shape=ODD, outputs: int = OUTPUTS):
        super().__init__(shape)
        self.inputs, self.outputs = shape[1], outputs
        self.wide = (shape[0], outputs, *shape[2:])

    def strided(self, channels: int, stride) -> tuple[int, int, int, int]:
        """Shape of what a convolution with this stride makes of `shape`."""
        n, _, h, w = self.shape
        return n, channels, -(-h // stride[0]), -(-w // stride[1])

    def dense(self, channels: int, stride) -> tuple[int, int, int, int]:
        """A shape of which a convolution with this stride makes that of `shape`; uneven where it can be."""
        n, _, h, w = self.shape
        return n, channels, h * stride[0] - (stride[0] > 1), w * stride[1]

    def normal(self, shape=None) -> Tensor:
        values = torch.randn(shape or self.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.contiguous(memory_format=torch.channels_last)

    def coarse(self, shape=None) -> Tensor:
        """Multiples of 1/2 in [-4, 4]."""
        return self._grid(shape or self.shape, 8, 0.5).contiguous(memory_format=torch.channels_last)

    def powers(self, size: int | None = None) -> Tensor:
        """Per-channel powers of two from 1/2 to 2, every other one negative."""
        exponents = self._grid((size or self.inputs,), 1, 1.0)
        signs = 1.0 - 2.0 * (torch.arange(exponents.numel(), device="cpu") % 2)
        return torch.exp2(exponents) * signs

    def weight(self, outputs: int | None = None, inputs: int | None = None) -> Tensor:
        """Multiples of 1/128 up to 1/4, so that sums of products stay exact in float32."""
        return self._grid((outputs or self.outputs, inputs or self.inputs, 1, 1), 32, 2**-7)

    def normal_weight(self) -> Tensor:
        """Keeps the deviation of its input; a mean of 0 in the output would have no relative error to speak of."""
        return self.normal((self.outputs, self.inputs, 1, 1)) / self.inputs**0.5 + 0.25

    def factors(self) -> dict:
        """0 for a dropped sample, 2 for the others; also for an empty batch."""
        return {"sample_factor": self.factor() if self.shape[0] else torch.empty(0, dtype=torch.float64)}

    def lazy(self, prefix: str = "x_") -> dict:
        """Scale and shift of the input, of few bits."""
        shift = self._grid((self.inputs,), 8, 0.25)
        return {f"{prefix}scale": self.powers(), f"{prefix}shift": shift}

    def bits(self, shape=None) -> Tensor:
        return pack_mask(self.data(shape) > 0)

    def symmetric(self) -> Tensor:
        half = self.weight(self.inputs)
        return half + half.transpose(0, 1)

    def gradient(self, keep: str, affine: str, factor: bool, shape=None) -> dict:
        """Options of a lazy gradient: mask ("none", "bits", "recompute"), coefficients ("none", "a", "abd"), factor."""
        shape = shape or self.wide
        options = {name: self.vector(shape[1]) for name in affine if affine != "none"}
        if keep == "recompute":
            options |= {"scale": self.vector(shape[1]), "shift": self.vector(shape[1])}
        if keep == "bits":
            options["mask"] = self.bits(shape)
        if keep == "recompute" or affine == "abd":
            options["z"] = self.data(shape)
        return options | (self.factors() if factor else {})


def draws() -> Iterator[tuple[str, Pointwise]]:
    """Every awkward shape, then every pair of awkward widths."""
    for name, (shape, outputs) in SHAPES.items():
        yield name, Pointwise(shape, outputs)
    for inputs, outputs in itertools.product(WIDTHS, WIDTHS):
        yield f"{inputs} to {outputs} channels", Pointwise((2, inputs, 3, 5), outputs)


def unread(x: Tensor) -> Tensor:
    """`x` with NaN at the pixels that a stride of 2 passes over."""
    x[:, :, 1::2] = torch.nan
    x[:, :, :, 1::2] = torch.nan
    return x


def specials(x: Tensor, row: int = 1) -> Tensor:
    """`x` with NaN, both infinities and -0.0, one kind a channel, in one row of the image."""
    for channel, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        x[:, channel, row] = value
    return x


def _one_hot(draw: Pointwise) -> Tensor:
    """A weight whose output k is input k: a special value stays in its channel, unless it meets a zero as infinity."""
    return torch.eye(draw.outputs, draw.inputs, dtype=torch.float64).view(draw.outputs, draw.inputs, 1, 1)


# conv1x1 --------------------------------------------------------------------------------------------------------


def conv1x1(dtype: torch.dtype) -> Iterator[Case]:
    for stride, lazy, stats in itertools.product(STRIDES, BOTH, BOTH):
        draw = Pointwise()
        options = (draw.lazy() if lazy else {}) | {"stride": list(stride), "emit_stats": stats}
        name = f"stride {stride}, lazy {lazy}, statistics {stats}"
        yield Case(name, (draw.normal(), draw.normal_weight()), options)
    for name, draw in draws():
        yield Case(name, (draw.normal(), draw.normal_weight()), draw.lazy())
        norm = {"gamma": draw.vector(draw.outputs), "beta": draw.vector(draw.outputs), "eps": 1e-3}
        yield Case(f"{name}, batch norm", (draw.normal(), draw.normal_weight()), draw.lazy() | norm)
    draw = Pointwise()
    yield Case("batch norm without parameters", (draw.normal(), draw.normal_weight()), {"eps": 1e-3})
    for (name, (shape, outputs)), stride in zip(SHAPES.items(), itertools.cycle(STRIDES[1:]), strict=False):
        draw = Pointwise(shape, outputs)
        yield Case(f"{name}, stride {stride}", (draw.normal(), draw.normal_weight()), {"stride": list(stride)})
    draw = Pointwise((2, 24, 20, 20), 16)
    yield Case("large mean", (draw.far_from_zero(dtype), _one_hot(draw)), {})
    yield Case("large mean, lazy", (draw.far_from_zero(dtype), _one_hot(draw)), draw.lazy() | _ones(draw))
    yield Case("constant", (torch.full_like(draw.data(), 0.375), draw.weight()), {})
    for lazy in BOTH:
        options = draw.lazy() if lazy else {}
        yield Case(f"not finite, lazy {lazy}", (specials(draw.data()), draw.weight()), options)
    draw = Pointwise((5, 24, 1, 1), 16)
    other = draw.normal().as_strided((5, 24, 1, 1), (24, 1, 1, 1))
    yield Case("other strides of a 1x1 image", (other, draw.normal_weight()), {})


def _ones(draw: Pointwise) -> dict:
    ones = torch.ones(draw.inputs, dtype=torch.float64)
    return {"x_scale": ones, "x_shift": 0 * ones}


# conv1x1_join ---------------------------------------------------------------------------------------------------


def _join_arguments(draw: Pointwise, coarse: bool) -> tuple:
    x, weight = (draw.coarse(), draw.weight()) if coarse else (draw.normal(), draw.normal_weight())
    return x, weight, draw.vector(draw.outputs), draw.vector(draw.outputs)


def _other_branch(draw: Pointwise, kind: str, stride=(1, 1)) -> dict:
    """What the join adds: nothing, a residual, an affine one, or a projection of a tensor of other channels."""
    k = draw.outputs
    if kind == "none":
        return {}
    if kind == "projection":
        x2, weight2 = draw.coarse(draw.dense(19, stride)), draw.weight(inputs=19)
        vectors = {"scale2": draw.vector(k), "shift2": draw.vector(k)}
        return {"x2": x2, "weight2": weight2, "stride2": list(stride)} | vectors
    vectors = {"residual_scale": draw.vector(k), "residual_shift": draw.vector(k)} if kind == "affine" else {}
    return {"residual": draw.data(draw.wide)} | vectors


def conv1x1_join(dtype: torch.dtype) -> Iterator[Case]:
    kinds = ("none", "plain", "affine", "projection")
    for kind, lazy, factor, relu, mask in itertools.product(kinds, *[BOTH] * 4):
        draw = Pointwise()
        options = (draw.lazy() if lazy else {}) | _other_branch(draw, kind) | (draw.factors() if factor else {})
        name = f"other {kind}, lazy {lazy}, factor {factor}, relu {relu}, mask {mask}"
        yield Case(name, _join_arguments(draw, mask), options | {"relu": relu, "emit_mask": mask})
    for stride, lazy in itertools.product(STRIDES[1:], BOTH):
        draw = Pointwise()
        options = (draw.lazy() if lazy else {}) | _other_branch(draw, "projection", stride) | draw.factors()
        yield Case(f"projection, stride {stride}, lazy {lazy}", _join_arguments(draw, True), options | MASK)
    for name, draw in draws():
        options = draw.lazy() | _other_branch(draw, "affine") | draw.factors()
        yield Case(f"{name}, affine residual", _join_arguments(draw, True), options | MASK)
    for (name, (shape, outputs)), stride in zip(SHAPES.items(), itertools.cycle(STRIDES[1:]), strict=False):
        draw = Pointwise(shape, outputs)
        options = draw.lazy() | _other_branch(draw, "projection", stride)
        yield Case(f"{name}, projection, stride {stride}", _join_arguments(draw, True), options | MASK)
    yield from _join_not_finite()


def _join_not_finite() -> Iterator[Case]:
    """A NaN output has its bit set; infinities of either sign and -0.0 go their way."""
    draw = Pointwise((2, 24, 3, 5), 13)  # bits that belong to no channel stay 0
    ones, zeros = torch.ones(13, dtype=torch.float64), torch.zeros(13, dtype=torch.float64)
    for relu in BOTH:
        options = {"residual": specials(draw.data(draw.wide)), "relu": relu}
        yield Case(f"residual not finite, relu {relu}", (draw.coarse(), draw.weight(), ones, zeros), options | MASK)
    options = draw.lazy() | {"residual": draw.data(draw.wide)}
    yield Case("input not finite", (specials(draw.coarse()), draw.weight(), ones, zeros), options | MASK)
    projection = _other_branch(draw, "projection")
    projection["x2"] = specials(projection["x2"])
    yield Case("projection not finite", _join_arguments(draw, True), projection | MASK)
    shift = torch.where(torch.arange(13) == 3, torch.nan, zeros)
    yield Case("NaN shift", (draw.coarse(), draw.weight(), ones, shift), MASK)


# gram -----------------------------------------------------------------------------------------------------------


def gram(dtype: torch.dtype) -> Iterator[Case]:
    """Of a lazy or strided input; `cases.gram` has the plain ones."""
    for stride, lazy in itertools.product(STRIDES[1:], BOTH):
        draw = Pointwise((3, 24, 5, 7))
        options = {"stride": list(stride)} | (draw.lazy("") if lazy else {})
        yield Case(f"stride {stride}, lazy {lazy}", (draw.normal(), draw.vector()), options)
    for name, (shape, _) in SHAPES.items():
        draw = Pointwise(shape)
        options = {"stride": [2, 2]} | draw.lazy("")
        yield Case(f"{name}, stride 2, lazy", (draw.normal(draw.dense(draw.inputs, (2, 2))), draw.vector()), options)
    draw = Pointwise((3, 33, 41, 43))
    yield Case("chunks, stride 2", (draw.normal(), draw.vector()), {"stride": [2, 2]})
    draw = Pointwise((2, 24, 5, 7))
    yield Case("NaN where nobody reads", (unread(draw.normal()), draw.vector()), {"stride": [2, 2]})
    for name, draw in draws():
        yield Case(f"{name}, lazy", (draw.normal(), draw.vector()), draw.lazy(""))
    for name, shape in {"three macro tiles": (2, 130, 9, 9), "chunks": (3, 33, 20, 41)}.items():
        draw = Pointwise(shape)
        yield Case(f"{name}, lazy", (draw.normal(), draw.vector()), draw.lazy(""))
    draw = Pointwise((2, 24, 20, 20))
    far, ones = draw.far_from_zero(dtype), torch.ones(24, dtype=torch.float64)
    yield Case("large mean, lazy", (far, far[0, :, 0, 0].clone(), ones, 0 * ones), {})
    yield Case("not finite", (specials(draw.data()), draw.vector()), {})
    yield Case("not finite, lazy", (specials(draw.data()), draw.vector()), draw.lazy(""))


CASES = {"conv1x1": conv1x1, "conv1x1_join": conv1x1_join}
