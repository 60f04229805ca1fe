"""Programs of nodes with tensors of their own: pre-activation blocks and whatever else has values with many readers."""

import functools

import torch

from resnet_fused.ops import activation
from resnet_fused.steps import Act, Average, Conv, Norm, StepTensors
from resnet_fused.steps.program import Addition, Averaging, Convolution, Normalisation, Program

F64 = torch.float64
P1, P3 = Conv(), Conv(padding=(1, 1))
S1, S3 = Conv(stride=(2, 2)), Conv((2, 2), (1, 1))
NORM = Norm()
HALVES, D_HALVES = Average(), Average(ceil_mode=True, count_include_pad=False)  # D: of ResNet-D


def leaf(*shape):
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def conv_tensors(inputs, outputs, kernel=1, bias=False):
    return StepTensors(leaf(outputs, inputs, kernel, kernel), leaf(outputs) if bias else None)


def norm_tensors(channels):
    running = torch.randn(channels, dtype=F64), torch.rand(channels, dtype=F64) + 0.5, torch.tensor(0)
    return StepTensors(None, None, leaf(channels), leaf(channels), *running)


NONE = StepTensors(None)


def preact_bottleneck(stride=1, projected=False, sampled=False, bias=False, outputs=6):
    """Value 2 is what the projection reads as well."""
    s1, s3 = (S1, S3) if stride == 2 else (P1, P3)
    nodes = [
        Normalisation(0, NORM), Convolution(1, P1), Normalisation(2, NORM), Convolution(3, s3), Normalisation(4, NORM),
        Convolution(5, P1),
    ]  # fmt: skip
    tensors = [norm_tensors(6), conv_tensors(6, 4, bias=bias), norm_tensors(4), conv_tensors(4, 4, 3), norm_tensors(4)]
    tensors.append(conv_tensors(4, outputs, bias=bias))
    if projected:
        nodes.append(Convolution(1, s1))
        tensors.append(conv_tensors(6, outputs))
    nodes.append(Addition(6, 7 if projected else 0, sampled=sampled))
    return Program(tuple(nodes)), [*tensors, NONE]


def post_bottleneck(projected, relu=True, sampled=False):
    nodes = [Convolution(0, P3), Normalisation(1, NORM), Convolution(2, P1), Normalisation(3, NORM, False)]
    tensors = [conv_tensors(6, 4, 3), norm_tensors(4), conv_tensors(4, 6), norm_tensors(6)]
    if projected:
        nodes += [Convolution(0, P1), Normalisation(5, NORM, False)]
        tensors += [conv_tensors(6, 6), norm_tensors(6)]
    nodes.append(Addition(4, 6 if projected else 0, relu, sampled))
    return Program(tuple(nodes)), [*tensors, NONE]


def activated_shortcut():
    """The first unit of a network: the shortcut is the activation itself."""
    nodes = (
        Normalisation(0, NORM),
        Convolution(1, P3),
        Normalisation(2, NORM),
        Convolution(3, P3),
        Addition(4, 1, True),
    )
    tensors = [norm_tensors(6), conv_tensors(6, 5, 3), norm_tensors(5), conv_tensors(5, 6, 3), NONE]
    return Program(nodes), tensors


def two_norms_of_one_value():
    """Two branches, each with a norm of its own of the input, and a sum that a third adds to."""
    nodes = (
        Normalisation(0, NORM), Convolution(1, P1), Normalisation(0, NORM), Convolution(3, P3), Addition(2, 4),
        Normalisation(5, NORM), Convolution(6, P1), Addition(7, 5), Convolution(0, P1), Addition(9, 8),
    )  # fmt: skip
    norms = [norm_tensors(6) for _ in range(3)]
    tensors = [
        norms[0], conv_tensors(6, 6), norms[1], conv_tensors(6, 6, 3), NONE, norms[2], conv_tensors(6, 6), NONE,
        conv_tensors(6, 6), NONE,
    ]  # fmt: skip
    return Program(nodes), tensors


def projection_of_a_norm():
    """What the branch and the projection read is itself a normalised value."""
    nodes = (
        Convolution(0, P3), Normalisation(1, NORM), Convolution(2, P1), Normalisation(3, NORM), Convolution(4, P1),
        Normalisation(5, NORM, False), Convolution(2, P1), Normalisation(7, NORM, False), Addition(6, 8, True),
    )  # fmt: skip
    tensors = [conv_tensors(6, 5, 3), norm_tensors(5), conv_tensors(5, 4), norm_tensors(4), conv_tensors(4, 7)]
    return Program(nodes), [*tensors, norm_tensors(7), conv_tensors(5, 7), norm_tensors(7), NONE]


def raw_value_read_twice():
    """A convolution's output that a norm and an addition read."""
    nodes = (Convolution(0, P3), Normalisation(1, NORM), Convolution(2, P1), Addition(3, 1))
    return Program(nodes), [conv_tensors(6, 5, 3), norm_tensors(5), conv_tensors(5, 5), NONE]


def transition(average=HALVES, conv=P1, bias=False, kernel=1):
    """Between dense blocks: the average is taken before the convolution where that is the same."""
    nodes = (Normalisation(0, NORM), Convolution(1, conv), Averaging(2, average))
    return Program(nodes), [norm_tensors(6), conv_tensors(6, 4, kernel, bias), NONE]


def averaged_shortcut(average=D_HALVES):
    """ResNet-D: the projection reads averages of the input."""
    nodes = (
        Convolution(0, S3), Normalisation(1, NORM), Convolution(2, P1), Normalisation(3, NORM, False),
        Averaging(0, average), Convolution(5, P1), Normalisation(6, NORM, False), Addition(4, 7, True),
    )  # fmt: skip
    tensors = [conv_tensors(6, 4, 3), norm_tensors(4), conv_tensors(4, 7), norm_tensors(7)]
    return Program(nodes), [*tensors, NONE, conv_tensors(6, 7), norm_tensors(7), NONE]


def averaged_inside(average=HALVES):
    """Anti-aliasing by averages: of what a norm with ReLU made, before the last convolution."""
    nodes = (
        Convolution(0, P3), Normalisation(1, NORM), Averaging(2, average), Convolution(3, P1),
        Normalisation(4, NORM, False), Averaging(0, average), Convolution(6, P1), Normalisation(7, NORM, False),
        Addition(5, 8, True),
    )  # fmt: skip
    tensors = [conv_tensors(6, 4, 3), norm_tensors(4), NONE, conv_tensors(4, 7), norm_tensors(7)]
    return Program(nodes), [*tensors, NONE, conv_tensors(6, 7), norm_tensors(7), NONE]


def averaged_preactivation(average=D_HALVES):
    """ResNet-D with identity mappings: a convolution and averages read one norm."""
    nodes = (
        Normalisation(0, NORM), Convolution(1, P1), Normalisation(2, NORM), Convolution(3, S3), Averaging(1, average),
        Convolution(5, P1), Addition(4, 6),
    )  # fmt: skip
    tensors = [norm_tensors(6), conv_tensors(6, 5), norm_tensors(5), conv_tensors(5, 7, 3), NONE, conv_tensors(6, 7)]
    return Program(nodes), [*tensors, NONE]


def averaged_end(average):
    """An average ends the block."""
    nodes = (Convolution(0, P3), Normalisation(1, NORM), Averaging(2, average))
    return Program(nodes), [conv_tensors(6, 4, 3), norm_tensors(4), NONE]


def inverted_residual(code, groups=1):
    """MobileNet's block: a norm with an activation before a 3x3 and before the last 1x1, a bare norm before the sum."""
    act = Act(code, 0.1)
    nodes = (
        Convolution(0, P1), Normalisation(1, NORM, False, act=act), Convolution(2, Conv(padding=(1, 1), groups=groups)),
        Normalisation(3, NORM, False, act=act), Convolution(4, P1), Normalisation(5, NORM, False), Addition(6, 0),
    )  # fmt: skip
    tensors = [conv_tensors(6, 8), norm_tensors(8), conv_tensors(8 // groups, 8, 3), norm_tensors(8)]
    return Program(nodes), [*tensors, conv_tensors(8, 6), norm_tensors(6), NONE]


def activated_end(code):
    """A block that ends in an activation, and reads its input through one."""
    act = Act(code, 0.1)
    nodes = (Normalisation(0, NORM, False, act=act), Convolution(1, P3), Normalisation(2, NORM, False, act=act))
    return Program(nodes), [norm_tensors(6), conv_tensors(6, 5, 3, bias=True), norm_tensors(5)]


def activation_read_twice():
    """A value behind an activation that two convolutions and a sum read."""
    act = Act(activation.SILU)
    nodes = (
        Convolution(0, P3), Normalisation(1, NORM, False, act=act), Convolution(2, P1), Normalisation(3, NORM),
        Convolution(4, P1), Normalisation(5, NORM, False), Convolution(2, P1), Normalisation(7, NORM, False),
        Addition(6, 8, True), Convolution(9, P1), Normalisation(10, NORM, False), Addition(11, 2, True),
    )  # fmt: skip
    pairs = [(conv_tensors(5, 5), norm_tensors(5)) for _ in range(4)]
    tensors = [conv_tensors(6, 5, 3), norm_tensors(5), *pairs[0], *pairs[1], *pairs[2], NONE, *pairs[3], NONE]
    return Program(nodes), tensors


ACTIVATED = {f"inverted residual, {name}": code for code, name in enumerate(activation.NAMES)}

CASES = {
    **{name: functools.partial(inverted_residual, code) for name, code in ACTIVATED.items()},
    "inverted residual, depthwise": lambda: inverted_residual(activation.SILU, 8),
    "activation at both ends": lambda: activated_end(activation.HARDSWISH),
    "activation read twice": activation_read_twice,
    "transition": transition,
    "transition, bias, 3x3 averages": lambda: transition(Average((3, 3), (1, 1)), bias=True),
    "transition, a 3x3 convolution": lambda: transition(conv=P3, kernel=3),
    "transition, parts of windows": lambda: transition(Average(ceil_mode=True)),
    "transition, padding": lambda: transition(Average((3, 3), (2, 2), (1, 1))),
    "averaged shortcut": averaged_shortcut,
    "averaged inside": averaged_inside,
    "averaged pre-activation": averaged_preactivation,
    "averaged pre-activation, whole windows": lambda: averaged_preactivation(Average((1, 2), (2, 2))),
    "averages at the end": lambda: averaged_end(Average((3, 2), (1, 2))),
    "averages at the end, parts of windows": lambda: averaged_end(Average(ceil_mode=True)),
    "identity": lambda: preact_bottleneck(),
    "biases": lambda: preact_bottleneck(bias=True),
    "projection": lambda: preact_bottleneck(projected=True, outputs=7),
    "strided projection": lambda: preact_bottleneck(2, True, outputs=7),
    "strided projection of few": lambda: preact_bottleneck(2, True, outputs=1),
    "sampled": lambda: preact_bottleneck(sampled=True),
    "post-activation": lambda: post_bottleneck(False),
    "post-activation with projection": lambda: post_bottleneck(True),
    "post-activation, sampled": lambda: post_bottleneck(False, sampled=True),
    "post-activation with projection, sampled": lambda: post_bottleneck(True, sampled=True),
    "post-activation without ReLU": lambda: post_bottleneck(True, relu=False, sampled=True),
    "activated shortcut": activated_shortcut,
    "two norms of one value": two_norms_of_one_value,
    "a projection of a norm": projection_of_a_norm,
    "a raw value read twice": raw_value_read_twice,
}


def leaves_of(x, tensors):
    found = {"x": x}
    for i, own in enumerate(tensors):
        found |= {f"{name}{i}": t for name, t in own._asdict().items() if t is not None and t.requires_grad}
    return {name: t for name, t in found.items() if t.requires_grad}


def observe(out, leaves):
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def factor_of(program, x):
    """A per-sample factor, where the program takes one."""
    return (
        torch.rand(x.shape[0], dtype=x.dtype)
        if any(getattr(node, "sampled", False) for node in program.nodes)
        else None
    )
