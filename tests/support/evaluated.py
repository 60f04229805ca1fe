"""Evaluation of calls, by stock operations where it leaves them to these, and programs to evaluate."""

import dataclasses

import torch
from programs import NONE, conv_tensors, norm_tensors
from torch import nn

from resnet_fused.blocks import kept_evaluation
from resnet_fused.steps import Conv, Norm, Pool
from resnet_fused.steps.program import Addition, Call, Convolution, Normalisation, Pooling, Program
from resnet_fused.steps.residual import residual_program
from resnet_fused.steps.stock import program_output

FROZEN, P1, P3 = Norm(batch_stats=False), Conv(), Conv(padding=(1, 1))


def evaluate(call, modules=None, dtype=None):
    out = kept_evaluation.evaluate(call, modules, dtype)
    if out is not None:
        return out
    return program_output(call if dtype is None else call._replace(tensors=[own.cast(dtype) for own in call.tensors]))


def stock_output(call):
    return program_output(call)


def moved(call, dtype, backend="auto"):
    """The call in `dtype`; norms stay in float32 beside 16 bits."""

    def to(t, wide):
        return t if t is None or not t.is_floating_point() else t.to(torch.float32 if wide else dtype)

    tensors = [type(own)(*(to(t, i > 1 and dtype.itemsize == 2) for i, t in enumerate(own))) for own in call.tensors]
    program = dataclasses.replace(call.program, backend=backend)
    return Call(program, call.x.to(dtype), tensors, to(call.residual, False))


def modules_of(call):
    return [nn.Identity() for _ in call.program.nodes]


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def frozen(program, tensors):
    """A program with running statistics, no sample factors, and tensors that want no gradients."""
    nodes = []
    for node in program.nodes:
        node = dataclasses.replace(node, norm=FROZEN) if isinstance(node, Normalisation) else node
        nodes.append(dataclasses.replace(node, sampled=False) if hasattr(node, "sampled") else node)
    own = [type(t)(*(one if one is None else one.detach() for one in t)) for t in tensors]
    return dataclasses.replace(program, nodes=tuple(nodes)), own


def pooled():
    """A stem: convolution, norm, ReLU and pool."""
    nodes = (Convolution(0, P3), Normalisation(1, FROZEN), Pooling(2, Pool()))
    return Program(nodes), [conv_tensors(6, 5, 3, bias=True), norm_tensors(5), NONE]


def residual_from_outside(relu=True):
    program = residual_program([(P3, FROZEN), (P1, FROZEN)], residual="tensor", relu=relu)
    return program, [conv_tensors(6, 4, 3), norm_tensors(4), conv_tensors(4, 7), norm_tensors(7), NONE]


def bare_norm_of_a_sum():
    """A norm without ReLU that two convolutions read, and one that ends the program."""
    nodes = (
        Convolution(0, P1), Addition(1, 0, True), Normalisation(2, FROZEN, False), Convolution(3, P3),
        Convolution(3, P1), Addition(5, 4), Normalisation(6, FROZEN, False),
    )  # fmt: skip
    convs = [conv_tensors(6, 6), conv_tensors(6, 6, 3, bias=True), conv_tensors(6, 6, bias=True)]
    return Program(nodes), [convs[0], NONE, norm_tensors(6), convs[1], convs[2], NONE, norm_tensors(6)]


def norms_on_both_sides():
    """A sum of a convolution and of a norm of the input, and one of two norms of it."""
    nodes = (
        Normalisation(0, FROZEN, False), Convolution(0, P3), Addition(2, 1, True), Normalisation(3, FROZEN, False),
        Normalisation(3, FROZEN, False), Addition(4, 5, True),
    )  # fmt: skip
    return Program(nodes), [norm_tensors(6), conv_tensors(6, 6, 3), NONE, norm_tensors(6), norm_tensors(6), NONE]


def plain_products():
    """1x1 convolutions without norms: one that a sum with ReLU follows, one with a projection, one with neither."""
    nodes = (Convolution(0, P1), Addition(1, 0, True), Convolution(2, P1), Convolution(2, P1), Addition(3, 4))
    nodes += (Convolution(5, P1), Addition(6, 5))
    convs = [conv_tensors(6, 6, bias=bias) for bias in (True, False, True, False)]
    return Program(nodes), [convs[0], NONE, convs[1], convs[2], NONE, convs[3], NONE]


def grouped():
    nodes = (Convolution(0, Conv(padding=(1, 1), groups=2)), Normalisation(1, FROZEN), Convolution(2, P1))
    return Program(nodes), [conv_tensors(3, 4, 3), norm_tensors(4), conv_tensors(4, 5, bias=True)]


def two_readers_of_a_norm(plain):
    """A norm that two 1x1 convolutions read: both add, or one has a norm of its own."""
    nodes = [Normalisation(0, FROZEN), Convolution(1, P1), Addition(2, 0), Convolution(1, P1)]
    tensors = [norm_tensors(6), conv_tensors(6, 6), NONE, conv_tensors(6, 6)]
    if not plain:
        nodes.append(Normalisation(4, FROZEN))
        tensors.append(norm_tensors(6))
    nodes += [Convolution(len(nodes), P3), Addition(len(nodes) + 1, 3)] if not plain else [Addition(4, 3)]
    return Program(tuple(nodes)), [*tensors, *([] if plain else [conv_tensors(6, 6, 3)]), NONE]


MORE = {
    "a norm of two sums": lambda: two_readers_of_a_norm(True),
    "a norm of a sum and a convolution": lambda: two_readers_of_a_norm(False),
    "pooled": pooled,
    "residual from outside": residual_from_outside,
    "residual without ReLU": lambda: residual_from_outside(False),
    "bare norms": bare_norm_of_a_sum,
    "norms on both sides": norms_on_both_sides,
    "plain products": plain_products,
    "a convolution at the end": grouped,
}
