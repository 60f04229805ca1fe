"""One table of cases per op: every combination of options on an odd shape, and every awkward shape with most options.

Values of ops that emit or recompute a mask lie on a coarse grid, see ``backends.selfcheck.draws``: their masks are then
the same in every arithmetic. Statistics and products get normal deviates.
"""

from __future__ import annotations

import importlib
import itertools
import pathlib
from collections.abc import Iterator

import torch

from ..backends.selfcheck.draws import Case, Draw
from ..ops.contract import channels_last_strides, pack_mask
from . import conv1x1_cases

Tensor = torch.Tensor

ODD = (2, 65, 3, 5)
SHAPES = {
    "3 channels": (2, 3, 5, 7),
    "65 channels": ODD,
    "one value": (1, 1, 1, 1),
    "one channel": (3, 1, 4, 5),
    "one row": (1, 64, 1, 1),
    "one pixel a sample": (5, 24, 1, 1),
    "ambiguous strides": (2, 8, 8, 1),
    "many rows": (2, 64, 40, 40),  # several chunks of work in every backend
    "many channels": (1, 520, 7, 7),
    "empty batch": (0, 8, 3, 3),
}


class NormalDraw(Draw):
    """As `Draw`, with normal deviates for activations."""

    def normal(self, shape=None) -> Tensor:
        values = torch.randn(shape or self.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.contiguous(memory_format=torch.channels_last)


def _shapes() -> Iterator[tuple[str, NormalDraw]]:
    for name, shape in SHAPES.items():
        yield name, NormalDraw(shape)


def _factor(draw: Draw) -> Tensor:
    """0 for a dropped sample, 2 for the others; also for an empty batch."""
    return draw.factor() if draw.shape[0] else torch.empty(0, dtype=torch.float64)


def _specials(draw: NormalDraw) -> Tensor:
    """Activations with NaN, infinities and negative zeros, one kind a channel; the other channels are clean."""
    x = draw.data()
    for channel, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        x[:, channel, 1] = value
    return x


def _contiguous_strides(x: Tensor) -> Tensor:
    """The same memory under the other strides that a 1x1 image allows."""
    return x.as_strided(x.shape, (x.shape[1], 1, 1, 1))


def bn_stats(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw in _shapes():
        yield Case(name, (draw.normal() + 1,), {})  # a mean of 0 has no relative error to speak of
    draw = NormalDraw((2, 24, 30, 30))
    yield Case("large mean", (draw.far_from_zero(dtype),), {})
    yield Case("constant", (torch.full_like(draw.data(), 0.375),), {})
    yield Case("not finite", (_specials(draw),), {})
    yield Case("other strides of a 1x1 image", (_contiguous_strides(NormalDraw((5, 24, 1, 1)).normal()),), {})
    huge = 1e4 + 1e-2 * draw.normal()
    if dtype in (torch.float32, torch.float64):
        yield Case("mean 1e4, deviation 1e-2", (huge.to(dtype).double(),), {})
    for name, draw in _shapes():
        parameters = {"gamma": draw.vector(), "beta": draw.vector(), "eps": 1e-3}
        for absent in ((), ("gamma",), ("beta",), ("gamma", "beta")):
            given = {key: value for key, value in parameters.items() if key not in absent}
            yield Case(f"{name}, batch norm without {', '.join(absent) or 'nothing'}", (draw.normal() + 1,), given)


def add_stats_(dtype: torch.dtype) -> Iterator[Case]:
    for (name, draw), factor in itertools.product(_shapes(), (False, True)):
        options = {"sample_factor": _factor(draw)} if factor else {}
        yield Case(f"{name}, factor {factor}", (draw.normal() + 1, draw.normal()), options)
    draw = NormalDraw((3, 24, 30, 30))
    for factor in (False, True):
        options = {"sample_factor": draw.factor()} if factor else {}
        yield Case(f"large mean, factor {factor}", (draw.far_from_zero(dtype), draw.far_from_zero(dtype)), options)
        yield Case(f"not finite, factor {factor}", (_specials(draw), draw.data()), options)
    half = torch.full_like(draw.data(), 0.1875)
    yield Case("constant", (half, half.clone()), {})
    yield Case("not finite on the other side", (draw.data(), _specials(draw)), {})
    if dtype in (torch.float32, torch.float64):
        huge = (1e4 + 1e-2 * draw.normal()).to(dtype).double()
        yield Case("mean 1e4, deviation 1e-2", (draw.data() / 1024, huge), {})


def _residual(draw: Draw, kind: str) -> dict:
    if kind == "none":
        return {}
    vectors = {"residual_scale": draw.vector(), "residual_shift": draw.vector()} if kind == "affine" else {}
    return {"residual": draw.data(), **vectors}


def norm_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    for kind, factor, relu, mask in itertools.product(("none", "plain", "affine"), *[(False, True)] * 3):
        draw = NormalDraw(ODD)
        options = _residual(draw, kind) | ({"sample_factor": draw.factor()} if factor else {})
        options |= {"relu": relu, "emit_mask": mask}
        name = f"residual {kind}, factor {factor}, relu {relu}, mask {mask}"
        yield Case(name, (draw.data(), draw.vector(), draw.vector()), options)
    for name, draw in _shapes():
        options = _residual(draw, "affine") | {"sample_factor": _factor(draw), "emit_mask": True}
        yield Case(name, (draw.data(), draw.vector(), draw.vector()), options)
    draw = NormalDraw((2, 24, 3, 5))
    ones, zeros = torch.ones(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    for relu in (True, False):
        options = {"residual": draw.data(), "relu": relu, "emit_mask": True}
        yield Case(f"not finite, relu {relu}", (_specials(draw), ones, zeros), options)


def _about_mean(draw: Draw, *names: str) -> dict:
    """Activations, and what the kernel subtracts from each before it sums them."""
    means = {"z": "mean", "residual": "residual_mean"}
    return {name: draw.data() for name in names} | {means[name]: draw.vector() for name in names}


def _keep(draw: Draw, kind: str) -> dict:
    """The options that say where the gradient passes."""
    if kind == "none":
        return {"relu": False}
    if kind == "recompute":
        return _about_mean(draw, "z") | {"scale": draw.vector(), "shift": draw.vector()}
    output = draw.data().clamp_min(0)
    return {"mask": output if kind == "output" else pack_mask(output > 0)}


def norm_add_relu_backward(dtype: torch.dtype) -> Iterator[Case]:
    keeps = ("none", "bits", "output", "recompute")
    for keep, z, residual, factor, emit in itertools.product(keeps, *[(False, True)] * 4):
        draw = NormalDraw(ODD)
        given = [name for name, there in (("z", z), ("residual", residual)) if there]
        options = _keep(draw, keep) | _about_mean(draw, *given)
        options |= ({"sample_factor": draw.factor()} if factor else {}) | {"emit_grad": emit}
        name = f"keep {keep}, z {z}, residual {residual}, factor {factor}, emit {emit}"
        yield Case(name, (draw.data(),), options)
    for (name, draw), keep in itertools.product(_shapes(), keeps[1:]):
        options = _about_mean(draw, "z", "residual") | {"sample_factor": _factor(draw)} | _keep(draw, keep)
        yield Case(f"{name}, keep {keep}", (draw.data(),), options)
    for name, draw in _shapes():
        yield Case(f"{name}, sums alone", (draw.data(),), _keep(draw, "recompute") | {"emit_grad": False})
    draw = NormalDraw((2, 24, 3, 5))
    z = _specials(draw)
    options = {"z": z, "scale": torch.ones(24).double(), "shift": torch.zeros(24).double(), "emit_grad": False}
    grad_out = torch.where(z <= 0, torch.nan, draw.data())
    yield Case("NaN, and where masked, sums alone", (grad_out,), options | {"mean": draw.vector()})
    output = _specials(draw).clamp_min(0)
    yield Case("NaN output", (draw.data(),), _about_mean(draw, "z") | {"mask": output})
    grad_out = torch.where(output <= 0, torch.nan, draw.data())
    options = _about_mean(draw, "z") | {"mask": pack_mask(~(output <= 0))}
    yield Case("NaN gradient where masked", (grad_out,), options)
    far = NormalDraw((2, 24, 20, 20))
    options = {"z": far.far_from_zero(dtype), "residual": far.far_from_zero(dtype), "relu": False}
    options |= {"mean": torch.full((24,), 64.0).double(), "residual_mean": torch.full((24,), 64.0).double()}
    yield Case("means far from zero", (far.data(),), options)


def norm_relu_coefficients(dtype: torch.dtype) -> Iterator[Case]:
    for (name, draw), keep, factor in itertools.product(_shapes(), ("bits", "output", "recompute"), (False, True)):
        options = _keep(draw, keep)
        options = {key: value for key, value in options.items() if key in ("mask", "shift")}
        options |= {"sample_factor": _factor(draw)} if factor else {}
        args = (draw.data(), draw.data(), draw.vector(), draw.vector().abs(), draw.vector())
        yield Case(f"{name}, keep {keep}, factor {factor}", args, options)
    draw = NormalDraw((2, 24, 3, 5))
    output = _specials(draw).clamp_min(0)
    args = (draw.data(), draw.data(), draw.vector(), draw.vector().abs(), draw.vector())
    yield Case("NaN output", args, {"mask": output})
    far = NormalDraw((2, 24, 20, 20))
    args = (far.data(), far.far_from_zero(dtype), torch.full((24,), 64.0).double(), far.vector().abs(), far.vector())
    yield Case("means far from zero", args, {"mask": pack_mask(far.data() > 0)})


def lazy_grad_apply(dtype: torch.dtype) -> Iterator[Case]:
    def options(draw: Draw, affine: bool, masked: bool, factor: bool, residual: bool) -> dict:
        names = (("b", "d") if affine else ()) + (("scale", "shift") if masked else ())
        given = ({"sample_factor": _factor(draw)} if factor else {}) | ({"residual": draw.data()} if residual else {})
        return {name: draw.vector() for name in names} | given

    for affine, masked, factor, residual in itertools.product(*[(False, True)] * 4):
        draw, name = NormalDraw(ODD), f"affine {affine}, masked {masked}, factor {factor}, residual {residual}"
        args = (draw.data(), draw.data() if affine or masked else None, draw.vector())
        yield Case(name, args, options(draw, affine, masked, factor, residual))
    for (name, draw), residual in itertools.product(_shapes(), (False, True)):
        args = (draw.data(), draw.data(), draw.vector())
        yield Case(f"{name}, residual {residual}", args, options(draw, True, True, True, residual))
        kept = draw.data() > 0
        args = (torch.where(kept, draw.data(), torch.nan), draw.data(), draw.vector() if residual else None)
        bits = {"mask": pack_mask(kept)} | options(draw, residual, False, residual, True)
        yield Case(f"{name}, bits, a {residual}", args, bits)
    draw = NormalDraw((2, 24, 3, 5))
    yield Case("not finite", (draw.data(), _specials(draw), draw.vector()), options(draw, False, True, False, False))
    yield Case("residual not finite", (draw.data(), None, draw.vector()), {"residual": _specials(draw)})


def gram(dtype: torch.dtype) -> Iterator[Case]:
    for name, draw in _shapes():
        yield Case(name, (draw.normal(), draw.vector()), {})
    for name, shape in {"three macro tiles": (2, 130, 9, 9), "chunks": (3, 33, 40, 41)}.items():
        draw = NormalDraw(shape)
        yield Case(name, (draw.normal(), draw.vector()), {})
    draw = NormalDraw((2, 24, 20, 20))
    far = draw.far_from_zero(dtype)
    yield Case("large mean, centre near it", (far, far[0, :, 0, 0].clone()), {})
    yield from conv1x1_cases.gram(dtype)


# x, weight, then stride, padding, dilation, groups
CONVOLUTIONS = {
    "1x1": ((2, 64, 9, 9), (40, 64, 1, 1), 1, 0, 1, 1),
    "1x1, 65 channels, stride 2": ((2, 65, 7, 7), (33, 65, 1, 1), 2, 0, 1, 1),
    "3x3, stride 2": ((3, 3, 9, 7), (5, 3, 3, 3), 2, 1, 1, 1),
    "3x3, dilated, groups": ((2, 32, 6, 6), (32, 8, 3, 3), 1, 2, 2, 4),
    "3x3, depthwise, one pixel": ((4, 8, 1, 1), (8, 1, 3, 3), 1, 1, 1, 8),
    "one channel": ((1, 1, 5, 5), (1, 1, 3, 3), 1, 1, 1, 1),
    "one output channel": ((2, 4, 6, 6), (1, 4, 1, 1), 1, 0, 1, 1),
    "one pixel a sample": ((3, 16, 1, 1), (8, 16, 1, 1), 1, 0, 1, 1),
    "one value": ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1, 1),
    "ambiguous strides": ((2, 8, 8, 1), (8, 8, 1, 1), 1, 0, 1, 1),
    "empty batch": ((0, 8, 3, 3), (8, 8, 1, 1), 1, 0, 1, 1),
}


def conv_add_relu(dtype: torch.dtype) -> Iterator[Case]:
    for (name, (shape, kernel, *where)), relu in itertools.product(CONVOLUTIONS.items(), (False, True)):
        stride, padding, dilation, groups = where
        places = ([stride] * 2, [padding] * 2, [dilation] * 2, groups, relu)
        size = [(n + 2 * padding - dilation * (kernel[2] - 1) - 1) // stride + 1 for n in shape[2:]]
        for shift, residual in itertools.product((False, True), (False, True)):
            draw = NormalDraw(shape)
            weight = draw.normal(kernel) / max(1, kernel[1] * kernel[2] ** 2) ** 0.5
            added = draw.normal((shape[0], kernel[0], *size)) if residual else None
            args = (draw.normal(), weight, draw.vector(kernel[0]) if shift else None, added, *places)
            yield Case(f"{name}, relu {relu}, shift {shift}, residual {residual}", args, {})
    draw = NormalDraw((2, 24, 5, 4))
    weight = draw.normal((24, 40, 1, 1)).transpose(0, 1) / 8
    yield Case("transposed weight", (draw.normal(), weight), {})


def conv_add_relu_(dtype: torch.dtype) -> Iterator[Case]:
    for case in conv_add_relu(dtype):
        x, weight, shift, residual, *where = (*case.args, None, None)[: max(4, len(case.args))]
        if residual is not None:
            yield Case(case.name, (residual, x, weight, shift, *where), {})


def conv_weight_grad(dtype: torch.dtype) -> Iterator[Case]:
    for name, (shape, kernel, stride, padding, dilation, groups) in CONVOLUTIONS.items():
        if groups == 1:
            draw = NormalDraw(shape)
            size = [(n + 2 * padding - dilation * (kernel[2] - 1) - 1) // stride + 1 for n in shape[2:]]
            places = ([stride] * 2, [padding] * 2, [dilation] * 2)
            args = (draw.normal((shape[0], kernel[0], *size)), draw.normal(), draw.normal(kernel), *places)
            yield Case(name, args, {})
    draw = NormalDraw((3, 130, 24, 24))  # two macro tiles of channels, several blocks of pixels
    yield Case("macro tiles", (draw.normal(), draw.normal(), draw.normal((130, 130, 3, 3)), [1, 1], [1, 1]), {})


_CASES = {f.__name__: f for f in (bn_stats, norm_add_relu, norm_add_relu_backward, lazy_grad_apply, gram)}
_CASES |= {f.__name__: f for f in (norm_relu_coefficients, conv_add_relu, conv_add_relu_, conv_weight_grad)}
_CASES |= {"lazy_grad_apply_": lazy_grad_apply, "add_stats_": add_stats_}
for _file in sorted(pathlib.Path(__file__).parent.glob("*_cases.py")):  # every one has a table of its own
    _CASES |= importlib.import_module(f".{_file.stem}", __package__).CASES


def _exact(value):
    """Channels_last strides that say so also where a dimension of size 1 allows others."""
    if isinstance(value, list):
        return list(map(_exact, value))
    images = isinstance(value, torch.Tensor) and value.dim() == 4
    chosen = images and value.is_contiguous(memory_format=torch.channels_last)
    one_pixel = chosen and value.stride() == (value.shape[1], 1, 1, 1)
    return value.as_strided(value.shape, channels_last_strides(value.shape)) if chosen and not one_pixel else value


def cases(op: str, dtype: torch.dtype) -> list[Case]:
    """The cases of `op` for activations of `dtype`, float64 on the CPU until :func:`..compare.check` places them.

    Raises:
        KeyError: the op has no cases.
    """
    return [
        Case(case.name, tuple(map(_exact, case.args)), {key: _exact(value) for key, value in case.kwargs.items()})
        for case in _CASES[op](dtype)
    ]
