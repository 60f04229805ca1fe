"""A call of an op as a problem of any size: which of its arguments' dimensions are one, and values for all of them.

A self-check makes of a real call a small one that runs the same binaries. An op's ``forms`` say how its arguments hang
together; a :class:`Problem` is a call in these terms, from which arguments of other sizes can be made, on the meta
device to see what they would start, or with values on a coarse grid (:mod:`.draws`).

The language of ``forms``: names of tensors and their form. With letters for numbers of channels: ``C`` a vector,
``KxC`` the weight of a 1x1 convolution, ``KxCx3`` of a 3x3 one, ``K*C`` a matrix, ``~C`` activations on the op's
pixels, ``!C`` their packed bits (or activations that stand for them), ``^C`` what a pool leaves of them. ``<stride``:
of more pixels, read at the stride of that name; ``>stride``: of those pixels that a stride leaves. ``N``: one number a
sample, of which ``N*C`` is a matrix; ``1``: a count. What only lends its pixels has a letter of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from ...ops import OPS
from ...ops.contract import channels_last_strides, is_channels_last, pack_mask, pitch
from ..cards import aligned
from .draws import Case, Draw, span
from .lazy_cases import GramJoin, PoolDraw

Tensor = torch.Tensor
Grid = tuple[int, int, int]  # samples, height and width


@dataclasses.dataclass(frozen=True)
class Form:
    """How one tensor follows from the sizes of a problem."""

    kind: str  # "vector", "samples", "count", "weight", "matrix", "~", "!" or "^"
    letters: str
    taps: int = 1  # of a weight, in a row
    direction: str = ""  # "<" or ">"
    stride: str = ""  # name of the argument


@functools.cache
def forms(op: str) -> dict[str, Form]:
    """The forms of an op's tensors by name."""
    found = {}
    for entry in OPS[op].forms.split():
        names, _, text = entry.partition(":")
        if text in ("N", "1"):
            form = Form("samples" if text == "N" else "count", "")
        elif "x" in text[1:2] or "*" in text:
            form = Form("weight" if "x" in text else "matrix", text[0] + text[2], int(text[4:] or 1))
        elif text[0] in "~!^":
            direction = text[2:3]
            form = Form(text[0], text[1], 1, direction, text[3:])
        else:
            form = Form("vector", text)
        found |= dict.fromkeys(names.split(","), form)
    return found


@functools.cache
def _arguments(op: str) -> tuple[tuple[str, object], ...]:
    """Names and defaults of an op's arguments, in order."""
    schema = torch._C.parse_schema(op + OPS[op].schema)
    return tuple((argument.name, argument.default_value) for argument in schema.arguments)


@dataclasses.dataclass(frozen=True)
class Like:
    """What a tensor keeps whatever the sizes."""

    dtype: torch.dtype
    aligned: bool
    beside: int = 0  # of activations: channels between those of one pixel and the next
    taps_last: bool = False  # of a weight of several taps: contiguous, not channels_last

    @classmethod
    def of(cls, value: Tensor, form: Form) -> Like:
        """What the tensor of a call keeps."""
        beside = pitch(value) - value.shape[1] if form.kind == "~" and value.numel() else 0
        taps_last = form.taps > 1 and not is_channels_last(value)
        return cls(value.dtype, aligned(value), beside, taps_last)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call, its sizes apart."""

    op: str
    grid: Grid  # the pixels over which the op's kernels go
    channels: dict[str, int]
    given: dict[str, object]  # every argument by name: `Like` for a tensor, else its value

    def resized(self, grid: Grid, channels: dict[str, int]) -> Problem:
        """The same call for other pixels and channels."""
        return dataclasses.replace(self, grid=grid, channels=channels)

    def pixels(self, form: Form) -> Grid:
        """Samples, height and width of an activation of this form."""
        n, h, w = self.grid
        steps = self.given[form.stride] if form.stride else (1, 1)
        if form.direction == "<":
            return n, h * steps[0], w * steps[1]
        return n, -(-h // steps[0]), -(-w // steps[1])

    def shape(self, form: Form) -> tuple[int, ...]:
        """Of a tensor of this form."""
        sizes = tuple(self.grid[0] if letter == "N" else self.channels[letter] for letter in form.letters)
        if form.kind == "samples":
            return self.grid[:1]
        if form.kind in ("vector", "matrix", "count"):
            return sizes
        if form.kind == "weight":
            return (*sizes, form.taps, form.taps)
        n, h, w = self.pixels(form)
        if form.kind == "^":
            window = self.given["kernel"], self.given["stride"], self.given.get("padding", (0, 0))
            size = zip((h, w), *window, strict=True)
            h, w = ((length + 2 * pad - window) // step + 1 for length, window, step, pad in size)
        return n, *sizes, h, w

    def meta(self) -> tuple[tuple, dict]:
        """Arguments without values."""
        return self._call({name: self._empty(name, like) for name, like in self._tensors().items()})

    def case(self, name: str, card=None) -> Case:
        """Arguments with values, in float64 where they are floating, and what :func:`.draws.place` needs."""
        tensors = self._tensors()
        values = _values(self, set(tensors))
        args, kwargs = self._call({name: self._laid_out(name, value) for name, value in values.items()})
        first = next(iter(self.given))
        likes = {0 if key == first else key: (like.dtype, like.aligned) for key, like in tensors.items()}
        return Case(name, args, kwargs, likes, card)

    def _tensors(self) -> dict[str, Like]:
        return {name: value for name, value in self.given.items() if isinstance(value, Like)}

    def _call(self, tensors: dict[str, Tensor]) -> tuple[tuple, dict]:
        (_, first), *rest = ((name, tensors.get(name, value)) for name, value in self.given.items())
        return (first,), dict(rest)

    def _strides(self, form: Form, like: Like) -> tuple[int, ...]:
        """Of a tensor of this form, unless it is of bits."""
        shape = self.shape(form)
        if form.kind in "~!^":
            return channels_last_strides((shape[0], shape[1] + like.beside, *shape[2:]))
        if form.taps > 1 and not like.taps_last:
            return channels_last_strides(shape)
        return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))

    def _laid_out(self, name: str, value: Tensor) -> Tensor:
        """`value` as it lies in a call like this one, where that is not as it was drawn."""
        form, like = forms(self.op)[name], self.given[name]
        if not like.beside and form.taps == 1:
            return value
        strides = self._strides(form, like)
        flat = value.new_zeros(span(torch.empty_strided(value.shape, strides, device="meta")))
        return flat.as_strided(value.shape, strides).copy_(value)

    def _empty(self, name: str, like: Like) -> Tensor:
        form = forms(self.op)[name]
        shape = self.shape(form)
        if form.kind == "!" and like.dtype == torch.uint8:
            shape, strides = (shape[0] * shape[2] * shape[3], -(-shape[1] // 8)), (-(-shape[1] // 8), 1)
        else:
            strides = self._strides(form, like)
        skip = 0 if like.aligned else 1
        room = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        flat = torch.empty(max(0, room) + skip, dtype=like.dtype, device="meta")
        return flat.as_strided(shape, strides, skip)


def problem(op: str, args: tuple, kwargs: dict) -> Problem:
    """A call in terms of :data:`FORMS`.

    Raises:
        KeyError: the op has no forms.
    """
    table = forms(op)
    names = [name for name, _ in _arguments(op)]
    given = dict(_arguments(op)) | dict(zip(names, args, strict=False)) | kwargs
    channels, grid = {}, None
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            continue
        form = table[name]
        sizes = value.shape[1:2] if form.kind in "~!^" else value.shape
        if value.dim() == 4 or form.kind not in "~!^":  # packed bits do not tell how many channels they are of
            channels |= {letter: size for letter, size in zip(form.letters, sizes, strict=False) if letter != "N"}
        if form.kind == "~" and form.direction != ">":
            n, _, h, w = value.shape
            steps = given[form.stride] if form.stride else (1, 1)
            grid = grid or (n, -(-h // steps[0]), -(-w // steps[1]))
        given[name] = Like.of(value, form)
    return Problem(op, grid or (1, 1, 1), channels, given)  # of vectors alone there are no pixels


# Values -----------------------------------------------------------------------------------------------------------


class _Draw(Draw):
    """Tensors of a problem."""

    def affine(self, size: int) -> tuple[Tensor, Tensor]:
        """A scale and a shift that make activations exact in bfloat16: the signs of outputs are then the same however
        their terms are added.
        """
        return self.vector(size).sign() * torch.exp2(self._grid((size,), 1, 1.0)), self._grid((size,), 16, 0.125)


def _values(p: Problem, names: set[str]) -> dict[str, Tensor]:
    """A tensor for each name, on the CPU."""
    n, h, w = p.grid
    shape = (n, p.channels.get("C", 1), h, w)
    if p.op in ("gram_norm", "gram_grad"):
        join = GramJoin(shape, p.channels["K"])
        drawn = join.norm() if p.op == "gram_norm" else join.grad()
        values = dict(zip((name for name, _ in _arguments(p.op)), drawn, strict=False))
        return values | {name: join.vector(p.channels["K"]) for name in ("gamma", "beta") if name in names}
    if p.op.startswith("norm_relu_pool"):
        return _pool_values(p, shape)
    draw, table = _Draw(shape), forms(p.op)
    values = {name: _value(p, draw, name, table[name]) for name in p.given if name in names and name != "gram"}
    if p.op == "bn_stats":  # where the order of sums matters
        values["z"] = draw.far_from_zero(p.given["z"].dtype)
    if "gram" in names:  # of the activation: variances and means that fit each other
        activation = (values.get(name) for name in ("x", "centre", "x_scale", "x_shift"))
        values["gram"], values["total"] = OPS["gram"].reference(*activation, p.given["stride"])
    if p.op == "conv1x1" and "x_scale" not in names:  # means near zero would show the rounding of what they are of
        values["x"] = values["x"].abs()
    if p.op == "norm_add_relu":
        values["z"][0, 0, 0, 0] = torch.nan
    return values


def _value(p: Problem, draw: _Draw, name: str, form: Form) -> Tensor:
    shape = p.shape(form)
    if form.kind == "samples":
        return draw.factor()
    if form.kind == "count":
        return torch.tensor(7)
    if form.kind == "vector":
        if name in ("x_scale", "x_shift"):
            return draw.affine(shape[0])[name == "x_shift"]
        vector = draw.vector(shape[0])
        if name == "x_rstd":  # near 1: what it multiplies are sums, each as exact as the largest
            return vector / 8 + 1
        return vector.abs() + 0.0625 if name in ("m2", "rstd", "var", "join_rstd") else vector
    if form.kind == "matrix":
        return draw.vector(math.prod(shape)).view(shape)
    if form.kind == "weight":
        weight = draw.data(shape) / 16
        return weight + weight.transpose(0, 1) if name == "coupling" else weight
    data = draw.data(shape)
    if form.kind == "!":
        return pack_mask(data > 0) if p.given[name].dtype == torch.uint8 else data.clamp_min(0)
    return data


def _pool_values(p: Problem, shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    draw = PoolDraw(shape, *(p.given[name] for name in ("kernel", "stride", "padding")))
    if p.op == "norm_relu_pool":
        drawn = draw.forward()
    elif p.op == "norm_relu_pool_backward":
        drawn = draw.backward()
    else:
        drawn = draw.apply(affine=p.given["b"] is not None, nan_where_masked=True)
    values = zip((name for name, _ in _arguments(p.op)), drawn, strict=False)
    return {name: value for name, value in values if isinstance(value, torch.Tensor)}
