"""Stochastic depth on survivors: a branch that runs on those samples alone that its drop path lets through.

Not what stock computes: batch norms within the branch normalise with the surviving samples and move their running
statistics by them; each other sample's result is its shortcut's. The draws are stock's. What the shortcut reads is
made of all samples, by its modules: a projection with its norm, and a norm before both paths.

Surviving samples are gathered, the branch, the sum and its ReLU run on them as one program, and the results are
scattered into the shortcut. Backward has a pass over each of these. Where nobody survives nothing of the branch runs:
running statistics stay, and its parameters' gradients are zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..plan.lower import obstacle
from ..steps.layout import Placed, arrived, behind, left, suggests_channels_last, worked_on
from ..steps.program import Addition, Program, reading
from .by_modules import computed
from .shape import Shape
from .site import Kept, Site

#: The words of ``fuse(model, drop_path=...)``: which samples a branch runs on.
WORDS = ("all", "survivors")


@dataclasses.dataclass(frozen=True)
class Parts:
    """A site whose last node adds the branch that is dropped, in parts."""

    shortcut: tuple[int, ...]  # values that are made of all samples, by their modules
    source: int  # the value that the branch reads: of these, or the input
    branch: Site  # the rest, which adds a residual from outside


def parts_of(site: Site) -> Parts | None:
    """The parts of `site`; None where its branch is not one that can run by itself."""
    if site.parts is None:
        site.parts = (_find(site),)
    return site.parts[0]


def _find(site: Site) -> Parts | None:
    program = site.shape.program
    last = program.nodes[-1]
    if not (isinstance(last, Addition) and last.sampled):
        return None
    shortcut = _needed(program, last.other)
    inside = [value for value, _ in program.numbered if value not in shortcut]
    sources = {read for value in inside[:-1] for read in program.maker(value).reads if read not in inside}
    if len(sources) != 1:
        return None
    source = sources.pop()
    numbers = {source: 0, **{value: number for number, value in enumerate(inside, 2)}}
    made = map(program.maker, inside[:-1])
    nodes = [reading(node, [numbers[read] for read in node.reads]) for node in made]
    nodes.append(dataclasses.replace(last, branch=numbers[last.branch], other=1))
    places = [value - program.inputs for value in inside]
    found = dataclasses.replace(program, nodes=tuple(nodes), inputs=2)
    if obstacle(found):
        return None
    shape, names = site.shape, tuple(site.shape.names[place] for place in places)
    own = Shape(found, names, shape.bypassed, "", shape.inplace_add)
    modules = tuple(site.modules[place] for place in places)
    return Parts(shortcut, source, Site(own, modules, site.bypassed, site.backend, site.precision, Kept()))


def _needed(program: Program, value: int) -> tuple[int, ...]:
    """The values that nodes make on the way to `value`, itself among them, in order."""
    needed, todo = set(), [value]
    while todo:
        value = todo.pop()
        if value >= program.inputs and value not in needed:
            needed.add(value)
            todo += program.maker(value).reads
    return tuple(sorted(needed))


class _Gather(torch.autograd.Function):
    """The samples of `index`, and all of them under a name of their own for :class:`_Scatter` alone.

    The gradient of that is read of the other samples only.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return _rows(x, index), x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor | None, rest: Tensor | None):
        (index,) = ctx.saved_tensors
        if rest is None:
            rest = None if grad is None else grad.new_zeros(()).expand(ctx.shape)
        elif grad is None:
            return rest.index_fill(0, index, 0), None
        return None if rest is None else rest.index_copy(0, index, grad), None


class _Scatter(torch.autograd.Function):
    """``relu(rest)``, or `rest`, with the samples of `index` replaced by `made`, whose ReLU has been."""

    @staticmethod
    def forward(ctx, rest: Tensor, made: Tensor, index: Tensor, relu: bool) -> Tensor:
        out = rest.relu() if relu else rest.clone()
        out[index] = made
        ctx.save_for_backward(index, *([out] if relu else []))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        index, *out = ctx.saved_tensors
        rest = torch.ops.aten.threshold_backward(grad, out[0], 0) if out else grad
        return rest, _rows(grad, index), None, None


class _Nobody(torch.autograd.Function):
    """A value as it is, with gradients of zeros for the parameters of a branch that nobody survived to."""

    @staticmethod
    def forward(ctx, out: Tensor, *parameters: Tensor) -> Tensor:
        ctx.likes = parameters
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        wanted = ctx.needs_input_grad[1:]
        return grad, *(torch.zeros_like(p) if need else None for p, need in zip(ctx.likes, wanted, strict=True))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The samples of `index`, in channels_last where `x` is."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.index_select(0, index)
    return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)


def output(site: Site, parts: Parts, x: Placed, residual: Tensor | None, factor: Tensor, run: Callable) -> Placed:
    """The output of `site`, the branch computed of the samples whose `factor` is not 0.

    `run`: a site's program, see :mod:`.runtime`.
    """
    program = site.shape.program
    last = program.nodes[-1]
    inputs = [left(x)] + [residual] * (residual is not None)
    values = {value: worked_on(t, suggests_channels_last(t)) for value, t in enumerate(inputs)}
    values = computed(site, values, only=parts.shortcut)
    other, index = values[last.other], factor.nonzero().flatten()
    if index.numel() == 0:
        # as it is with a branch, whose dtype the factor has
        dtype = factor.dtype if site.shape.inplace_add else torch.promote_types(factor.dtype, other.dtype)
        out = torch.relu(other.to(dtype)) if last.relu else other.to(dtype, copy=True)  # which somebody may write to
        own = [p for module in parts.branch.modules if module is not None for p in module.parameters()]
        out = _Nobody.apply(out, *own)
    else:
        kept, rest = _Gather.apply(other, index)
        read = kept if last.other == parts.source else _Gather.apply(values[parts.source], index)[0]
        of_these = factor[index].contiguous()
        made = run(parts.branch, arrived(read), kept, factor=of_these)
        if made is None:
            made = computed(parts.branch, {0: read, 1: kept}, of_these)[parts.branch.shape.program.output]
        else:
            made = made.value
        if rest.shape[1:] != made.shape[1:]:
            rest = rest.expand(rest.shape[0], *made.shape[1:])
        out = _Scatter.apply(rest.to(made.dtype), made, index, last.relu)
    weights = [site.modules[node].weight for node in program.main_convolutions]
    return behind(out, x, weights, program)
