"""Cases of the gradients of 1x1 convolutions; see :mod:`.conv1x1_cases`. All data lies on the grid of ``Draw``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case
from ..ops import OPS
from ..ops.contract import pack_mask, unpack_mask
from .conv1x1_cases import BOTH, SHAPES, STRIDES, Pointwise, draws, specials, unread

Tensor = torch.Tensor

KEEPS = ("none", "bits", "recompute")  # how a gradient's mask comes
COEFFICIENTS = ("none", "a", "abd")


# conv1x1_dgrad --------------------------------------------------------------------------------------------------


def _summed(draw: Pointwise) -> dict:
    """Of a lazy input, whose sums are asked for."""
    return draw.lazy() | {"x_mean": draw.vector()}


def _asked(draw: Pointwise, kind: str) -> dict:
    """What is added to the product and asked of it; by name."""
    if "coefficients" in kind:
        return _asked(draw, kind.replace("coefficients", "sums")) | {"x_rstd": draw.vector().abs() + 0.0625}
    if kind in ("nothing", "sums"):
        return {} if kind == "nothing" else {"x": draw.data()} | _summed(draw)
    if kind == "constant":
        return {"constant": draw.vector()}
    if kind.startswith("coupling"):  # of a Gram join; the input is a tensor if a join wrote it, lazy otherwise
        lazy = _summed(draw) if "sums" in kind else {}
        options = {"x": draw.data(), "coupling": draw.symmetric(), "constant": draw.vector()} | lazy
        return options | (_asked(draw, "residual, bits") if "residual" in kind else {})
    stride = next((s for s in STRIDES if str(s) in kind), (1, 1))
    shape = draw.strided(draw.inputs, stride)
    bits = {"residual_mask": draw.bits(shape)} if "bits" in kind else {}
    return {"residual": draw.data(shape), "residual_stride": list(stride)} | bits


ASKED = (
    "nothing",
    "sums",
    "coefficients",
    "coupling, coefficients",
    "constant",
    "coupling",
    "coupling, sums",
    "coupling, residual",
    "residual",
    "residual, bits",
    "residual, (2, 2)",
    "residual, bits, (2, 1)",
)


def conv1x1_dgrad(dtype: torch.dtype) -> Iterator[Case]:
    for keep, affine, factor in itertools.product(KEEPS, COEFFICIENTS, BOTH):
        for asked in ("nothing", "coupling, sums", "residual, bits"):
            draw = Pointwise()
            options = draw.gradient(keep, affine, factor) | _asked(draw, asked)
            name = f"keep {keep}, coefficients {affine}, factor {factor}, asked {asked}"
            yield Case(name, (draw.data(draw.wide), draw.weight()), options)
    for asked, (keep, affine) in itertools.product(ASKED[1:], (("none", "none"), ("recompute", "abd"))):
        draw = Pointwise((3, 24, 5, 6), 40)
        options = draw.gradient(keep, affine, affine == "abd") | _asked(draw, asked)
        yield Case(f"asked {asked}, keep {keep}", (draw.data(draw.wide), draw.weight()), options)
    yield from _dgrad_strided()
    yield from _dgrad_without_weight()
    yield from _dgrad_and_weight()
    for name, draw in draws():
        options = draw.gradient("recompute", "abd", True) | _asked(draw, "coupling, sums")
        yield Case(f"{name}, everything lazy", (draw.data(draw.wide), draw.weight()), options)
    for name, (shape, outputs) in SHAPES.items():
        draw = Pointwise(shape, outputs)
        options = draw.gradient("bits", "a", False) | _asked(draw, "residual, bits, (2, 1)")
        yield Case(f"{name}, strided residual", (draw.data(draw.wide), draw.weight()), options)
    draw = Pointwise((2, 24, 20, 20), 16)
    far = {"x": draw.far_from_zero(dtype), "x_mean": torch.full((24,), 64.0).double()}  # all positive: nothing masked
    far |= {"x_scale": torch.ones(24).double(), "x_shift": torch.ones(24).double()}
    yield Case("sums, mean far from zero", (draw.data(draw.wide), draw.weight()), far)
    yield from _dgrad_not_finite()


def _dgrad_strided() -> Iterator[Case]:
    """The gradient of the pixels that a strided convolution read."""
    for stride, asked in itertools.product(STRIDES[1:], ("sums", "coupling", "coupling, sums", "coupling, residual")):
        x = Pointwise((3, 24, 5, 7))
        draw = Pointwise(x.strided(24, stride), 40)
        options = draw.gradient("recompute", "abd", True) | _asked(draw, asked)
        options |= {"x": x.data(), "x_stride": list(stride)}
        yield Case(f"asked {asked}, x stride {stride}", (draw.data(draw.wide), draw.weight()), options)
    for name, (shape, outputs) in SHAPES.items():
        draw = Pointwise(shape, outputs)
        options = draw.gradient("bits", "a", False) | _asked(draw, "coupling")
        options |= {"x": draw.data(draw.dense(draw.inputs, (2, 2))), "x_stride": [2, 2]}
        yield Case(f"{name}, x stride 2", (draw.data(draw.wide), draw.weight()), options)
    draw = Pointwise((2, 24, 3, 4), 16)
    options = _asked(draw, "coupling") | {"x": unread(draw.data((2, 24, 5, 7))), "x_stride": [2, 2]}
    yield Case("NaN where nobody reads", (draw.data(draw.wide), draw.weight()), options)


def _dgrad_without_weight() -> Iterator[Case]:
    """The gradient is a product already."""
    for asked, (keep, affine) in itertools.product(ASKED, (("none", "none"), ("recompute", "abd"))):
        draw = Pointwise((3, 24, 5, 6), 24)
        options = draw.gradient(keep, affine, affine == "abd") | _asked(draw, asked)
        yield Case(f"no weight, asked {asked}, keep {keep}", (draw.data(draw.wide), None), options)
    for name, (shape, _) in SHAPES.items():
        draw = Pointwise(shape, shape[1])
        yield Case(f"{name}, no weight", (draw.data(), None), _asked(draw, "coupling, sums"))
    draw = Pointwise((2, 24, 3, 5), 24)
    yield Case("gradient not finite, no weight", (specials(draw.data()), None), _asked(draw, "sums"))


def _dgrad_and_weight() -> Iterator[Case]:
    """The weight's gradient too."""

    def case(name: str, draw: Pointwise, options: dict) -> Case:
        options = {"x": draw.data()} | options | {"weight_grad": True}
        return Case(f"and the weight's, {name}", (draw.data(draw.wide), draw.weight()), options)

    for asked, (keep, affine) in itertools.product(ASKED, (("bits", "a"), ("recompute", "abd"))):
        draw = Pointwise((3, 24, 5, 6), 40)
        options = draw.gradient(keep, affine, affine == "abd") | _asked(draw, asked)
        yield case(f"asked {asked}, keep {keep}", draw, options)
    shapes = SHAPES | {"several merging tiles": ((1, 200, 5, 4), 72), "several splits": ((3, 24, 40, 41), 8)}
    for name, (shape, outputs) in shapes.items():
        for asked in ("coefficients", "residual, bits, (2, 1)"):
            draw = Pointwise(shape, outputs)
            yield case(f"{name}, asked {asked}", draw, draw.gradient("recompute", "abd", False) | _asked(draw, asked))
    for stride, asked in itertools.product(STRIDES[1:], ("nothing", "sums")):
        x = Pointwise((3, 24, 5, 7))
        draw = Pointwise(x.strided(24, stride), 40)
        options = draw.gradient("bits", "a", True) | _asked(draw, asked) | {"x": x.data(), "x_stride": list(stride)}
        yield case(f"asked {asked}, x stride {stride}", draw, options)
    draw = Pointwise((2, 24, 3, 5), 16)
    yield case("x not finite", draw, _asked(draw, "sums") | {"x": specials(draw.data())})


def _dgrad_not_finite() -> Iterator[Case]:
    """A masked NaN becomes 0, a NaN pre-activation passes the gradient, as in stock."""
    draw = Pointwise((2, 24, 3, 5), 16)
    keep = draw.data(draw.wide) > 0
    g = torch.where(keep, draw.data(draw.wide), torch.nan)
    yield Case("NaN gradient where masked", (g, draw.weight()), {"mask": pack_mask(keep)} | _asked(draw, "sums"))
    options = draw.gradient("recompute", "none", False)
    z = options["z"]
    pre = z * options["scale"].view(1, -1, 1, 1) + options["shift"].view(1, -1, 1, 1)
    g = torch.where(pre <= 0, torch.inf, draw.data(draw.wide))
    z[:, :, 1], g[:, :, 1] = torch.nan, 0.5
    yield Case("infinite gradient where masked, NaN in z", (g, draw.weight()), options)
    asked = _asked(draw, "sums")
    asked["x"] = specials(asked["x"])
    yield Case("x not finite", (draw.data(draw.wide), draw.weight()), asked)
    asked = _asked(draw, "residual, bits")
    there = unpack_mask(asked["residual_mask"], asked["residual"])
    asked["residual"] = torch.where(there, asked["residual"], torch.nan)
    yield Case("NaN residual where masked", (draw.data(draw.wide), draw.weight()), asked)
    yield Case("gradient not finite", (specials(draw.data(draw.wide)), draw.weight()), _asked(draw, "sums"))


# conv1x1_wgrad --------------------------------------------------------------------------------------------------


def conv1x1_wgrad(dtype: torch.dtype) -> Iterator[Case]:
    strides = itertools.cycle(STRIDES)
    kinds = itertools.product(KEEPS, COEFFICIENTS, BOTH, BOTH)
    for (keep, affine, factor, lazy), stride in zip(kinds, strides, strict=False):
        draw = Pointwise()
        options = draw.gradient(keep, affine, factor) | (draw.lazy() if lazy else {}) | {"stride": list(stride)}
        name = f"keep {keep}, coefficients {affine}, factor {factor}, lazy {lazy}, stride {stride}"
        yield Case(name, (draw.data(draw.wide), draw.data(draw.dense(draw.inputs, stride))), options)
    for name, draw in draws():
        options = draw.gradient("recompute", "abd", True) | draw.lazy()
        yield Case(f"{name}, everything lazy", (draw.data(draw.wide), draw.data()), options)
    for name, (shape, outputs) in SHAPES.items():
        draw = Pointwise(shape, outputs)
        options = draw.gradient("bits", "a", False) | {"stride": [2, 2]}
        yield Case(f"{name}, stride 2", (draw.data(draw.wide), draw.data(draw.dense(draw.inputs, (2, 2)))), options)
        rounded = {"mask": draw.bits(draw.wide), "rounded": True}
        yield Case(f"{name}, rounded", (draw.data(draw.wide), draw.data()), rounded | draw.lazy())
    yield from _wgrad_of_a_join()
    for name, shape in {"several tiles of both": (2, 200, 9, 9), "long": (3, 24, 40, 41)}.items():
        draw = Pointwise(shape, 136 if shape[1] > 136 else 8)
        yield Case(name, (draw.normal(draw.wide) + 0.25, draw.normal()), draw.lazy())
    draw = Pointwise((2, 24, 3, 5), 16)
    keep = draw.data(draw.wide) > 0
    g = torch.where(keep, draw.data(draw.wide), torch.nan)
    yield Case("NaN gradient where masked", (g, draw.data()), {"mask": pack_mask(keep)} | draw.lazy())
    options = draw.lazy()
    options["x_shift"][3] = torch.inf  # times a gradient of 0, of a row that does not exist, it would be NaN
    yield Case("infinite shift", (draw.data(draw.wide).abs() + 0.5, draw.data()), options)
    yield Case("x not finite", (draw.data(draw.wide), specials(draw.data())), draw.lazy())
    yield Case("gradient not finite", (specials(draw.data(draw.wide)), draw.data()), {})


def _wgrad_of_a_join() -> Iterator[Case]:
    """What :mod:`..ops.gram_grad` makes of both results; of normal deviates, as the cases of that op."""
    wide = {"one row of W more than a program's": ((2, 24, 6, 5), 5), "even": ((2, 256, 11, 12), 64)}
    wide |= {"channels beyond a tile": ((3, 264, 6, 7), 70), "several splits": ((3, 24, 40, 41), 8)}
    for number, (name, (shape, outputs)) in enumerate((SHAPES | wide).items()):
        draw, lazy = Pointwise(shape, outputs), number % 2 == 1
        options = {"x_scale": draw.powers(), "x_shift": draw.vector()} if lazy else {}
        yield _join(f"Gram join, {name}, lazy {lazy}", draw, draw.normal(), options)
    for stride in STRIDES[1:]:
        draw = Pointwise()
        yield _join(f"Gram join, stride {stride}", draw, draw.normal(draw.dense(draw.inputs, stride)), {}, stride)


def _join(name: str, draw: Pointwise, x: Tensor, options: dict, stride=(1, 1)) -> Case:
    """A masked gradient, and the small matrices of the activation."""
    centre = draw.vector()
    gram, total = OPS["gram"].reference(x, centre, options.get("x_scale"), options.get("x_shift"), stride)
    options |= {"mask": draw.bits(draw.wide), "stride": list(stride), "gram": gram, "total": total, "centre": centre}
    options |= {"join_weight": draw.normal_weight(), "join_scale": draw.vector(draw.outputs)}
    options |= {"join_rstd": draw.vector(draw.outputs).abs() + 0.0625}
    return Case(name, (draw.normal(draw.wide), x), options)


# conv1x1_backward -----------------------------------------------------------------------------------------------

#: Beside `conv1x1_cases.SHAPES`: as narrow as the op takes.
NARROW = {"many channels": ((1, 200, 5, 4), 120), "many outputs": ((1, 72, 5, 4), 248)}


def _both(draw: Pointwise, name: str, gradient: dict, asked: str, lazy: bool = False, **options) -> Case:
    """A case of `conv1x1_backward`. `lazy`: x is, where `asked` does not say so already."""
    options = gradient | (draw.lazy() if lazy else {}) | _asked(draw, asked) | options
    x = options.pop("x", None)
    return Case(name, (draw.data(draw.wide), draw.weight(), draw.data() if x is None else x), options)


def conv1x1_backward(dtype: torch.dtype) -> Iterator[Case]:
    for keep, affine, factor in itertools.product(KEEPS, COEFFICIENTS, BOTH):
        for asked, lazy in (("nothing", True), ("coupling, sums", False), ("residual, bits", False)):
            draw = Pointwise()
            name = f"keep {keep}, coefficients {affine}, factor {factor}, asked {asked}"
            yield _both(draw, name, draw.gradient(keep, affine, factor), asked, lazy)
    for asked, lazy, scaled in itertools.product(ASKED, BOTH, BOTH):
        draw = Pointwise((3, 24, 5, 6), 40)
        scale = {"weight_scale": draw.vector(40)} if scaled else {}
        gradient = draw.gradient("bits", "none", False)
        yield _both(draw, f"asked {asked}, lazy {lazy}, scaled {scaled}", gradient, asked, lazy, **scale)
    yield from _both_shapes()
    yield from _both_not_finite(dtype)


def _both_shapes() -> Iterator[Case]:
    pairs = itertools.product((1, 3, 65), (1, 3, 65))
    shapes = SHAPES | NARROW | {f"{c} to {k} channels": ((2, c, 3, 5), k) for c, k in pairs}
    for name, (shape, outputs) in shapes.items():
        draw = Pointwise(shape, outputs)
        asked = "coupling, sums" if shape[1] <= 64 and outputs <= 128 else "sums"
        yield _both(draw, f"{name}, everything lazy", draw.gradient("recompute", "abd", True), asked)
        draw = Pointwise(shape, outputs)
        gradient = draw.gradient("recompute", "abd", False) | {"rounded": True}
        yield _both(draw, f"{name}, rounded", gradient, asked.replace("sums", "coefficients"))
        draw = Pointwise(shape, outputs)
        scale = {"weight_scale": draw.vector(outputs)}
        yield _both(draw, f"{name}, Gram join", draw.gradient("bits", "none", False), "nothing", True, **scale)
        draw = Pointwise(shape, outputs)
        yield _both(draw, f"{name}, strided residual", draw.gradient("bits", "a", False), "residual, bits, (2, 1)")


def _both_not_finite(dtype: torch.dtype) -> Iterator[Case]:
    draw = Pointwise((2, 24, 3, 5), 16)
    keep = draw.data(draw.wide) > 0
    g = torch.where(keep, draw.data(draw.wide), torch.nan)
    masked = {"mask": pack_mask(keep), "weight_scale": draw.vector(16)} | draw.lazy()
    yield Case("NaN gradient where masked", (g, draw.weight(), draw.data()), masked)
    options = draw.lazy()
    options["x_shift"][3] = torch.inf  # times a gradient of 0, of a row that does not exist, it would be NaN
    g = draw.data(draw.wide).abs() + 0.5
    yield Case("infinite shift", (g, draw.weight(), draw.data()), options)
    yield Case("x not finite", (draw.data(draw.wide), draw.weight(), specials(draw.data())), _summed(draw))
    g = specials(draw.data(draw.wide))
    yield Case("gradient not finite", (g, draw.weight(), draw.data()), _asked(draw, "residual, bits"))
    draw = Pointwise((2, 24, 20, 20), 16)
    far = {"x_mean": torch.full((24,), 64.0).double()}  # all positive: nothing masked
    far |= {"x_scale": torch.ones(24).double(), "x_shift": torch.ones(24).double()}
    yield Case("sums, mean far from zero", (draw.data(draw.wide), draw.weight(), draw.far_from_zero(dtype)), far)


CASES = {"conv1x1_dgrad": conv1x1_dgrad, "conv1x1_wgrad": conv1x1_wgrad, "conv1x1_backward": conv1x1_backward}
