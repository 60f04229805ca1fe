"""Backward of a program by stock operations: where it is differentiated again, batched, or what it reads has moved."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..backends import run
from . import stock
from .batch_norm import Affine
from .flow import Backward
from .lazy import Lazy
from .program import Call, Normalisation, Program
from .saved import unmoved, version
from .spec import StepTensors, flatten, regroup

aten = torch.ops.aten
INPUTS = 6  # of the node's arguments, where x and the residual are; the tensors of its program's nodes follow


def counters(program: Program) -> list[int]:
    """Where the counters of norms that used running statistics lie among flat tensors; versions tell if these moved."""
    frozen = [i for i, n in enumerate(program.nodes) if isinstance(n, Normalisation) and not n.norm.batch_stats]
    return [(i + 1) * len(StepTensors._fields) - 1 for i in frozen]


def moved(ctx) -> bool:
    """Whether somebody trained with the program's norms since its forward in evaluation."""
    return any(version(counter) != before for counter, before in ctx.counters)


def gradients(ctx, grad_out: Tensor, b: Backward) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, and all tensors of nodes.

    `b`: what was kept. Where somebody trained with the norms since a forward in evaluation, they are of the running
    statistics as these are now, as in stock, which reads them again.
    """
    program, create_graph = b.program, torch.is_grad_enabled()
    x, flat = _originals(ctx, b)
    needs, grad_residual = ctx.needs_input_grad[INPUTS:], None
    with torch.enable_grad(), torch.autocast(grad_out.device.type, enabled=False):
        if program.inputs > 1:  # its value is in the mask, which is all that a gradient wants of it
            grad_out = grad_residual = _behind_relu(ctx, b, grad_out)
            last = dataclasses.replace(program.nodes[-1], relu=False)
            program = dataclasses.replace(program, nodes=(*program.nodes[:-1], last))
        # Aliases of its own for each place: what x was made from, and whoever else has a parameter, is not this node's
        x, flat = _alias(x, needs[0]), [_alias(t, t is not None and t.requires_grad) for t in flat]
        kept = tensors = regroup(flat)
        if moved(ctx):
            tensors = [_as_in_forward(b, number, own) for number, own in enumerate(kept, program.inputs)]
        read = x.contiguous() if ctx.converted else x  # as stock had it: its batched gradients depend on the layout
        # Values that were kept and that no gradient goes through: what they were, whatever has moved since.
        apart = {n: t for n, t in enumerate(b.values) if n >= program.inputs and not b.wanted[n]}
        known = {number: value for number, value in apart.items() if isinstance(value, Tensor)}
        out = stock.program_output(Call(program, read, tensors, None, b.sample_factor), known=known)
        for own, now in zip(tensors, kept, strict=True):
            if own is not now:  # not in place: autograd must not see it
                own.running_mean.data.copy_(now.running_mean)
                own.running_var.data.copy_(now.running_var)
        inputs = [x, None, *(t for t, place in zip(flat, ctx.facts.places, strict=True) if place is not None)]
        wanted = [i for i, need in enumerate(needs) if need and i != 1]
        sources = [inputs[i] for i in wanted]
        options = {"create_graph": create_graph, "allow_unused": True}
        grads = torch.autograd.grad(out, sources, grad_out, **options) if sources else ()
    result = dict(zip(wanted, grads, strict=True)) | {1: grad_residual if needs[1] else None}
    return tuple(map(result.get, range(len(needs))))


def _alias(t: Tensor | None, wanted: bool) -> Tensor | None:
    """`t` under a name that nothing else is made from, if it wants a gradient."""
    return aten.alias(t) if wanted else t  # with its very strides


def _originals(ctx, b: Backward) -> tuple[Tensor, list[Tensor | None]]:
    """The input and the tensors of all nodes, flat, as autograd knows them."""
    unmoved(ctx.others, ctx.versions)
    x, flat = b.values[0], flatten(b.tensors[b.program.inputs :])
    for place, t in zip(ctx.facts.aliased, ctx.others, strict=False):  # an input that was not saved comes last
        flat[place] = t
    return x if ctx.facts.keeps_input else ctx.others[-1], flat


def _behind_relu(ctx, b: Backward, grad_out: Tensor) -> Tensor:
    """The gradient of the residual: `grad_out` where the ReLU let the sum pass."""
    if not b.program.clamped:
        return grad_out
    mask = b.values[b.program.output]
    if b.program.output in b.masks:  # bits
        ones = torch.ones(grad_out.shape, dtype=ctx.facts.dtype, device=grad_out.device)
        ones = ones.contiguous(memory_format=torch.channels_last)
        mask = run("norm_add_relu_backward", ones, mask=b.masks[b.program.output], backend=b.backend)[0]
    if ctx.converted:  # see `gradients`
        grad_out, mask = grad_out.contiguous(), mask.contiguous()
    return aten.threshold_backward(grad_out, mask, 0)


def _as_in_forward(b: Backward, number: int, own: StepTensors) -> StepTensors:
    """The tensors of the node that makes value `number`, with the running statistics that forward used."""
    node = b.program.maker(number)
    if not isinstance(node, Normalisation) or node.norm.batch_stats or own.running_mean is None:
        return own
    value = b.activated.get(number, b.values[number])
    bn: Affine | None = b.folded[number].bn if number in b.folded else value.bn if isinstance(value, Lazy) else None
    if bn is None:  # no gradient passes: they were copied, for those who may be moved
        mean, var = b.tensors[number][4:6]
        return own if mean is None else own._replace(running_mean=mean.clone(), running_var=var.clone())
    dtype = own.running_mean.dtype
    var = bn.rstd.square().reciprocal() - node.norm.eps
    return own._replace(running_mean=bn.mean.to(dtype, copy=True), running_var=var.to(dtype))
